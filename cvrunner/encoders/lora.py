"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) in the self-attention of an encoder, with peft.

A projection `W x` becomes `W x + alpha / rank * B A dropout(x)`. `A` is random and `B` zero at the start, so training
starts from the pretrained encoder.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from cvrunner.encoders.dropout import replace_dropouts
from cvrunner.encoders.encoder import SpeechEncoder


def add_adapters(encoder: SpeechEncoder) -> None:
    """Add the adapters that the encoder's adaptation names, if it names any; torch draws their random values."""
    lora = encoder.adaptation.lora
    if lora is None:
        return
    # peft takes seconds to import, and no other condition needs it.
    from peft import LoraConfig, inject_adapter_in_model

    # Layers above the topmost mixed hidden state would get no gradient.
    layers = range(encoder.below, max(encoder.layers))
    parents = tuple(f"{encoder.LAYERS}.{layer}." for layer in layers)
    targets = tuple(f".{target}_proj" for target in lora.targets)
    names = [n for n, _ in encoder.backbone.named_modules() if n.startswith(parents) and n.endswith(targets)]
    settings = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=names)
    inject_adapter_in_model(settings, encoder.backbone)
    # Their dropout is drawn per utterance, too.
    replace_dropouts(encoder.backbone, lambda _: "lora")
    encoder.train(encoder.training)


def merged(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the trained `weights` of a model as those of the same model without adapters.

    Each adapted projection is `W + alpha / rank * B A`, under its own name; what has no adapter stays as it is.
    """
    found = {name: weight for name, weight in weights.items() if ".lora_" not in name}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            found[f"{name}.weight"] = module.base_layer.weight + module.get_delta_weight("default")
    return found
