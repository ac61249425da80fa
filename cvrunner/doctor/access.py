"""Who can reach what: token, listening addresses, ports, and what is known of the installed versions."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from packaging.version import Version

from cvrunner.doctor.facts import Facts, Packages
from cvrunner.doctor.finding import Finding, ok, problem, short, warning
from cvrunner.orchestration.machine import Cluster, Listener, Service, Token

OWNER_ONLY = 0o077
"""Permission bits that a token file must not have."""
RAY_START = (
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 ray start --head --node-ip-address 127.0.0.1 --dashboard-host 127.0.0.1"
)
"""Without that variable Ray 2.60 on Linux turns 127.0.0.1 into the machine's own address and listens everywhere."""
MLFLOW_START = "make ui, or mlflow ui --host 127.0.0.1 --backend-store-uri sqlite:////ABSOLUTE/results/mlflow.db"


@dataclass(frozen=True)
class Vulnerability:
    """A published hole in a package that cvrunner runs."""

    package: str
    cve: str
    fixed_in: str
    what: str


VULNERABILITIES = (
    # CVE records and advisories as of November 2026. CVE-2023-48022 is not among them: Ray disputes it, and without a
    # token and beyond loopback it is in every version; `check_token` and `check_listeners` are about it.
    Vulnerability("ray", "CVE-2025-62593", "2.52.0", "a web page open in a browser runs code through the dashboard"),
    Vulnerability("ray", "CVE-2026-27482", "2.54.0", "a web page open in a browser deletes jobs"),
    Vulnerability("ray", "CVE-2026-41486", "2.55.0", "reading a Parquet file runs code in it"),
    Vulnerability("mlflow", "CVE-2025-14279", "3.5.0", "a web page open in a browser reaches a server on loopback"),
    Vulnerability("mlflow", "CVE-2026-2611", "3.10.0", "a web page open in a browser runs commands on this machine"),
    Vulnerability("mlflow", "CVE-2026-2652", "3.10.0", "the login does not cover the jobs interface"),
    Vulnerability("mlflow", "CVE-2026-4137", "3.11.0", "other users of this machine can replace downloaded models"),
    Vulnerability("mlflow", "CVE-2026-96804", "3.15.0", "a model from somebody else runs code when loaded"),
    Vulnerability("mlflow", "CVE-2026-116690", "3.17.0", "whoever reaches the server reads its files"),
    Vulnerability("mlflow", "CVE-2026-116692", "3.17.0", "whoever reaches the server runs code on it"),
)


@dataclass(frozen=True)
class Port:
    """A port that Ray or MLflow wants by default."""

    number: int
    service: Service
    use: str
    other: str
    """How to take another one."""


PORTS = (
    Port(6379, "Ray", "Ray's cluster", "ray start --head --port 6380"),
    Port(8265, "Ray", "Ray's dashboard", "ray start --head --dashboard-port 8266"),
    Port(5000, "MLflow", "MLflow's pages", "make ui PORT=5001"),
)


def check_access(facts: Facts) -> Iterator[Finding]:
    """All of this file, in reading order."""
    yield check_vulnerabilities(facts.packages, "ray")
    yield check_vulnerabilities(facts.packages, "mlflow")
    yield from check_token(facts.token, facts.cluster is not None)
    yield check_cluster(facts.cluster, facts.hardware.host)
    yield from check_listeners(facts.listeners, facts.cluster, facts.hardware.host)
    yield from check_ports(facts.listeners)


def check_vulnerabilities(packages: Packages, package: str) -> Finding:
    """The installed version against the table above."""
    subject = f"{package} CVEs"
    installed = packages.installed.get(package)
    if installed is None:
        return ok(subject, "not installed")
    known = [v for v in VULNERABILITIES if v.package == package]
    there = [v for v in known if Version(installed) < Version(v.fixed_in)]
    if not there:
        return ok(subject, f"{installed} has the fixes of {', '.join(v.cve for v in known)}")
    floor = max((v.fixed_in for v in there), key=Version)
    what = "; ".join(f"{v.cve}: {v.what} (fixed in {v.fixed_in})" for v in there)
    return problem(subject, f"{installed}: {what}", f"pip install '{package}>={floor}'")


def check_token(token: Token, cluster: bool) -> Iterator[Finding]:
    """Whether Ray asks for a token, whether there is one, and who can read it. `cluster`: there is one to reach."""
    subject = "Ray token"
    there = token.in_environment or token.file_mode is not None
    mode = None if token.auth_mode is None else token.auth_mode.lower()
    exposed = "whoever reaches Ray's ports runs code as you (CVE-2023-48022)"
    if mode not in (None, "token", "disabled"):
        yield problem(subject, f"RAY_AUTH_MODE is {token.auth_mode!r}, must be token", "export RAY_AUTH_MODE=token")
    elif mode == "disabled":
        yield problem(subject, f"switched off by RAY_AUTH_MODE: {exposed}", "export RAY_AUTH_MODE=token")
    elif not there and token.file_chosen:
        yield problem(
            subject, f"RAY_AUTH_TOKEN_PATH {short(token.file)}: no such file, Ray stops", "unset RAY_AUTH_TOKEN_PATH"
        )
    elif not there:
        level = problem if cluster else warning
        what = f"there is none: a cluster started with `ray start` asks for none, and {exposed}"
        do = f"export RAY_AUTH_MODE=token; ray get-auth-token --generate; chmod 600 {short(token.file)}"
        yield level(subject, what, do)
    elif mode is None:
        what = "there is one, but RAY_AUTH_MODE is not set: `ray job submit` does not send it"
        yield warning(subject, what, "export RAY_AUTH_MODE=token")
    elif token.in_environment:
        yield ok(subject, "RAY_AUTH_MODE=token, in RAY_AUTH_TOKEN")
    else:
        yield ok(subject, f"RAY_AUTH_MODE=token, in {short(token.file)}")
    if token.file_mode is not None:
        yield _token_file(token.file, token.file_mode)


def _token_file(file: Path, mode: int) -> Finding:
    if mode & OWNER_ONLY:
        what = f"{short(file)}, mode {mode:03o}: other users of this machine can read it"
        return problem("Ray token file", what, f"chmod 600 {short(file)}")
    return ok("Ray token file", f"{short(file)}, mode {mode:03o}")


def check_cluster(cluster: Cluster | None, host: str) -> Finding:
    """Whether the cluster answers; where there is none, what happens instead."""
    subject = "Ray cluster"
    if cluster is None:
        return ok(subject, "none; `all-folds` starts Ray on this machine, `ray job submit` needs `ray start` first")
    name = f"RAY_ADDRESS {cluster.address}" if cluster.chosen else f"Ray of this machine, {cluster.address},"
    if cluster.error is None:
        size = f"{cluster.nodes} node{'s' * (cluster.nodes != 1)}, {cluster.gpus:g} GPU, {cluster.cpus:g} CPU"
        if cluster.address.startswith("http://") and not is_loopback(urlsplit(cluster.address).hostname or ""):
            do = f"{tunnel(host)}; export RAY_ADDRESS=http://127.0.0.1:8265"
            return warning(subject, f"{name}: token and code cross the network in the clear ({size})", do)
        return ok(subject, f"{name} has {size}")
    if not cluster.chosen:
        do = "export RAY_AUTH_MODE=token, with the token of who started it; then ray status"
        return warning(subject, f"{name} does not tell its size: {cluster.error}", do)
    do = f"unset RAY_ADDRESS, or export RAY_AUTH_MODE=token, or start it there: {RAY_START} (that variable also here)"
    return problem(subject, f"{name} cannot be used: {cluster.error}", do)


def check_listeners(listeners: Sequence[Listener] | None, cluster: Cluster | None, host: str) -> Iterator[Finding]:
    """Every Ray and MLflow process must listen on loopback alone, but for a Ray of several nodes."""
    if listeners is None:
        do = "sudo lsof -nP -iTCP -sTCP:LISTEN   (Ray and MLflow only on 127.0.0.1)"
        yield warning("Listening", "this system shows other programs' ports to its administrator only", do)
        return
    for service, start in (("Ray", RAY_START), ("MLflow", MLFLOW_START)):
        own = [listener for listener in listeners if listener.service == service]
        open_ = [listener for listener in own if not is_loopback(listener.host)]
        subject = f"{service} listens"
        if not own:
            yield ok(subject, "nowhere")
        elif not open_:
            yield ok(subject, f"on loopback alone ({_some(own)})")
        elif service == "Ray" and cluster is not None and cluster.nodes > 1:
            do = f"keep these ports inside the cluster's network; from elsewhere: {tunnel(host)}"
            yield warning(subject, f"beyond this machine, as {cluster.nodes} nodes need: {_some(open_)}", do)
        else:
            do = f"stop it, then {start}; from elsewhere: {tunnel(host)}"
            yield problem(subject, f"beyond this machine: {_some(open_)}", do)


def check_ports(listeners: Sequence[Listener] | None) -> Iterator[Finding]:
    """Whether the default ports are free, taken by whom they are for, or by another program."""
    for port in PORTS if listeners is not None else ():
        subject = f"Port {port.number}"
        taken = [listener for listener in listeners or () if listener.port == port.number]
        others = [listener for listener in taken if listener.service != port.service]
        if others:
            pid = f"pid {others[0].pid}" if others[0].pid is not None else "of another user"
            what = f"{port.use}: taken by {others[0].program} ({pid})"
            yield warning(subject, what, port.other)
        else:
            yield ok(subject, f"{port.use}: {f'{taken[0].program}, pid {taken[0].pid}' if taken else 'free'}")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address; names but `localhost` count as others."""
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def tunnel(host: str) -> str:
    """The line that brings a remote dashboard to loopback."""
    return f"ssh -N -L 8265:127.0.0.1:8265 {host}"


def _some(listeners: Sequence[Listener], shown: int = 4) -> str:
    places = sorted({f"{one.program} {_plain(one.host)}:{one.port}" for one in listeners})
    return ", ".join(places[:shown]) + (f" and {len(places) - shown} more" if len(places) > shown else "")


def _plain(host: str) -> str:
    """An IPv4 address in IPv6's clothes as IPv4, a real IPv6 address in brackets."""
    host = host.removeprefix("::ffff:")
    return f"[{host}]" if ":" in host else host
