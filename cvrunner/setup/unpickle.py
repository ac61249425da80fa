"""Write the tensors of pickled checkpoints as one file of safetensors: `python -m cvrunner.setup.unpickle OUT FILE...`

A separate program: whatever a checkpoint might do to the process that opens it, none of cvrunner's work is in there.
"""

from __future__ import annotations

import sys

import torch
from safetensors.torch import save_file


def unpickle(target: str, sources: list[str]) -> None:
    """Write `target`. Ends the program with one sentence if the files hold other objects than tensors by name."""
    tensors: dict[str, torch.Tensor] = {}
    for source in sources:
        try:
            # Builds tensors and plain containers; any other object in the file is an error.
            state = torch.load(source, map_location="cpu", weights_only=True)
        except Exception as error:
            kind = type(error).__name__
            if kind == "UnpicklingError":
                sys.exit(f"{source} is damaged, or holds other objects than tensors, which could run code")
            sys.exit(f"{source} cannot be read as a checkpoint ({kind})")
        if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
            found = ", ".join(map(repr, list(state)[:4])) if isinstance(state, dict) else type(state).__name__
            sys.exit(f"{source} must hold tensors by name, as save_pretrained writes them, but holds {found}")
        tensors |= state
    # Safetensors stores no tensor that shares its memory with another one.
    apart = {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    save_file(apart, target, metadata={"format": "pt"})


if __name__ == "__main__":
    unpickle(sys.argv[1], sys.argv[2:])
