"""Who can reach Ray and MLflow: known vulnerabilities, token, listening addresses, ports."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from packaging.version import Version

from cvrunner.doctor.facts import Facts, Finding, Packages, ok, problem, short, warning
from cvrunner.orchestration.machine import Cluster, Listener, Service, Token
from cvrunner.text import plural

OWNER_ONLY = 0o077
"""Permission bits that a token file must not have: those of group and others."""
RAY_START = (
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 ray start --head --node-ip-address 127.0.0.1 --dashboard-host 127.0.0.1"
)
"""Without that variable Ray 2.60 on Linux turns 127.0.0.1 into the machine's own address and listens everywhere."""
MLFLOW_START = "cvrunner ui"


@dataclass(frozen=True)
class Vulnerability:
    """A published vulnerability of a package that cvrunner runs."""

    package: str
    cve: str
    fixed_in: str
    what: str


VULNERABILITIES = (
    # CVE records and advisories as of November 2026. CVE-2023-48022 is not among them: Ray disputes it, and every
    # version has it without a token and beyond loopback, which `check_token` and `check_listeners` look for.
    Vulnerability("ray", "CVE-2025-62593", "2.52.0", "a web page open in a browser runs code through the dashboard"),
    Vulnerability("ray", "CVE-2026-27482", "2.54.0", "a web page open in a browser deletes jobs"),
    Vulnerability("ray", "CVE-2026-41486", "2.55.0", "reading a Parquet file runs code in it"),
    Vulnerability("mlflow", "CVE-2025-14279", "3.5.0", "a web page open in a browser reaches a server on loopback"),
    Vulnerability("mlflow", "CVE-2026-2611", "3.10.0", "a web page open in a browser runs commands on this machine"),
    Vulnerability("mlflow", "CVE-2026-2652", "3.10.0", "the login does not cover the jobs interface"),
    Vulnerability("mlflow", "CVE-2026-4137", "3.11.0", "other users of this machine can replace downloaded models"),
    Vulnerability("mlflow", "CVE-2026-96804", "3.15.0", "a model from an untrusted source runs code when loaded"),
    Vulnerability("mlflow", "CVE-2026-116690", "3.17.0", "anyone who reaches the server reads its files"),
    Vulnerability("mlflow", "CVE-2026-116692", "3.17.0", "anyone who reaches the server runs code on it"),
)


@dataclass(frozen=True)
class Port:
    """A port that Ray or MLflow uses by default."""

    number: int
    service: Service
    use: str
    other: str
    """How to use another port."""


PORTS = (
    Port(6379, "Ray", "Ray's cluster", "ray start --head --port 6380"),
    Port(8265, "Ray", "Ray's dashboard", "ray start --head --dashboard-port 8266"),
    Port(5000, "MLflow", "MLflow's pages", "cvrunner ui --port 5001"),
)


def check_access(facts: Facts) -> Iterator[Finding]:
    """Run all checks of this module."""
    yield check_vulnerabilities(facts.packages, "ray")
    yield check_vulnerabilities(facts.packages, "mlflow")
    yield from check_token(facts.token, facts.cluster is not None)
    yield check_cluster(facts.cluster, facts.hardware.host)
    yield check_proxies(facts.proxies)
    yield from check_listeners(facts.listeners, facts.cluster, facts.hardware.host)
    yield from check_ports(facts.listeners)


def check_vulnerabilities(packages: Packages, package: str) -> Finding:
    """Compare the installed version with VULNERABILITIES."""
    subject = f"{package} CVEs"
    installed = packages.installed.get(package)
    if installed is None:
        return ok(subject, "not installed")
    known = [v for v in VULNERABILITIES if v.package == package]
    open_ = [v for v in known if Version(installed) < Version(v.fixed_in)]
    if not open_:
        return ok(subject, f"{installed} has the fixes of {', '.join(v.cve for v in known)}")
    # The highest fixed version has the other fixes too.
    floor = max((v.fixed_in for v in open_), key=Version)
    what = "; ".join(f"{v.cve}: {v.what} (fixed in {v.fixed_in})" for v in open_)
    return problem(subject, f"{installed}: {what}", f"pip install '{package}>={floor}'")


def check_token(token: Token, cluster: bool) -> Iterator[Finding]:
    """Check that Ray asks for a token, that it exists, and who can read it. `cluster`: whether a cluster is running."""
    yield _check_auth_mode(token, cluster)
    if token.file_mode is None:
        return
    what = f"{short(token.file)}, mode {token.file_mode:03o}"
    if token.file_mode & OWNER_ONLY:
        what += ": other users of this machine can read it"
        yield problem("Ray token file", what, f"chmod 600 {short(token.file)}")
    else:
        yield ok("Ray token file", what)


def _check_auth_mode(token: Token, cluster: bool) -> Finding:
    subject, enable = "Ray token", "export RAY_AUTH_MODE=token"
    exists = token.in_environment or token.file_mode is not None
    mode = token.auth_mode and token.auth_mode.lower()
    exposed = "anyone who reaches Ray's ports runs code as you (CVE-2023-48022)"
    if mode not in (None, "token", "disabled"):
        return problem(subject, f"RAY_AUTH_MODE is {token.auth_mode!r}, must be token", enable)
    if mode == "disabled":
        return problem(subject, f"switched off by RAY_AUTH_MODE: {exposed}", enable)
    if not exists and token.file_chosen:
        what = f"RAY_AUTH_TOKEN_PATH {short(token.file)}: no such file, Ray stops"
        return problem(subject, what, "unset RAY_AUTH_TOKEN_PATH")
    if not exists:
        # Without a cluster nobody can reach anything yet, so this is only a warning.
        level = problem if cluster else warning
        what = f"there is none: a cluster started with `ray start` asks for none, and {exposed}"
        return level(subject, what, f"{enable}; ray get-auth-token --generate; chmod 600 {short(token.file)}")
    if mode is None:
        what = "there is one, but RAY_AUTH_MODE is not set: `ray job submit` does not send it"
        return warning(subject, what, enable)
    if token.in_environment:
        return ok(subject, "RAY_AUTH_MODE=token, in RAY_AUTH_TOKEN")
    return ok(subject, f"RAY_AUTH_MODE=token, in {short(token.file)}")


def check_cluster(cluster: Cluster | None, host: str) -> Finding:
    """Check that the cluster answers; if there is none, report what happens instead."""
    subject = "Ray cluster"
    if cluster is None:
        return ok(subject, "none; `all-folds` starts Ray on this machine, `ray job submit` needs `ray start` first")
    name = f"RAY_ADDRESS {cluster.address}" if cluster.chosen else f"Ray of this machine, {cluster.address},"
    if cluster.error is None:
        size = f"{plural(cluster.nodes, 'node')}, {cluster.gpus:g} GPU, {cluster.cpus:g} CPU"
        if cluster.address.startswith("http://") and not is_loopback(urlsplit(cluster.address).hostname or ""):
            do = f"{tunnel(host)}; export RAY_ADDRESS=http://127.0.0.1:8265"
            return warning(subject, f"{name}: token and code cross the network unencrypted ({size})", do)
        return ok(subject, f"{name} has {size}")
    if not cluster.chosen:
        do = "export RAY_AUTH_MODE=token, with the token of whoever started it; then ray status"
        return warning(subject, f"{name} does not report its size: {cluster.error}", do)
    do = f"unset RAY_ADDRESS, or export RAY_AUTH_MODE=token, or start it there: {RAY_START} (and set that here)"
    return problem(subject, f"{name} cannot be used: {cluster.error}", do)


def check_proxies(proxies: Mapping[str, str]) -> Finding:
    """Report the proxies of the environment, and what does not go through them."""
    if not proxies:
        return ok("Proxy", "none")
    # A user name and a password in the address must not be shown.
    shown = ", ".join(f"{scheme} {uri.rpartition('@')[2]}" for scheme, uri in sorted(proxies.items()))
    return ok("Proxy", f"{shown}; not for requests to this machine, nor to a cluster without encryption")


def check_listeners(listeners: Sequence[Listener] | None, cluster: Cluster | None, host: str) -> Iterator[Finding]:
    """Check that Ray and MLflow listen on loopback only, except for Ray on several nodes."""
    if listeners is None:
        do = "sudo lsof -nP -iTCP -sTCP:LISTEN   (Ray and MLflow only on 127.0.0.1)"
        yield warning("Listening", "this system shows other programs' ports to its administrator only", do)
        return
    for service, start in (("Ray", RAY_START), ("MLflow", MLFLOW_START)):
        own = [listener for listener in listeners if listener.service == service]
        exposed = [listener for listener in own if not is_loopback(listener.host)]
        subject = f"{service} listens"
        if not own:
            yield ok(subject, "nowhere")
        elif not exposed:
            yield ok(subject, f"on loopback only ({_addresses(own)})")
        elif service == "Ray" and cluster is not None and cluster.nodes > 1:  # its nodes must reach each other
            do = f"keep these ports inside the cluster's network; from elsewhere: {tunnel(host)}"
            yield warning(subject, f"beyond this machine, as {cluster.nodes} nodes need: {_addresses(exposed)}", do)
        else:
            do = f"stop it, then {start}; from elsewhere: {tunnel(host)}"
            yield problem(subject, f"beyond this machine: {_addresses(exposed)}", do)


def check_ports(listeners: Sequence[Listener] | None) -> Iterator[Finding]:
    """Check that the default ports are free or used by the service they are for."""
    if listeners is None:
        return
    for port in PORTS:
        subject = f"Port {port.number}"
        taken = [listener for listener in listeners if listener.port == port.number]
        others = [listener for listener in taken if listener.service != port.service]
        if others:
            owner = "of another user" if others[0].pid is None else f"pid {others[0].pid}"
            yield warning(subject, f"{port.use}: taken by {others[0].program} ({owner})", port.other)
        elif taken:
            yield ok(subject, f"{port.use}: {taken[0].program}, pid {taken[0].pid}")
        else:
            yield ok(subject, f"{port.use}: free")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address; any name except `localhost` counts as reachable."""
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        address = address.ipv4_mapped
    return address.is_loopback


def tunnel(host: str) -> str:
    """Return the command that forwards a remote dashboard to loopback."""
    return f"ssh -N -L 8265:127.0.0.1:8265 {host}"


def _addresses(listeners: Sequence[Listener], shown: int = 4) -> str:
    places = set()
    for one in listeners:
        host = one.host.removeprefix("::ffff:")  # an IPv4 address in IPv6 notation
        if ":" in host:
            host = f"[{host}]"
        places.add(f"{one.program} {host}:{one.port}")
    text = ", ".join(sorted(places)[:shown])
    if len(places) > shown:
        text += f" and {len(places) - shown} more"
    return text
