"""How many parameters GMT would mask: the model of a config on the meta device, without weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from axolotl.loaders.adapter import load_lora
from axolotl.utils.dict import DictDefault
from axolotl.utils.freeze import freeze_layers_except, freeze_mm_modules
from peft import get_peft_model
from transformers import PreTrainedModel

from axolotl_gmt.config import GMTConfig
from axolotl_gmt.masking.masker import GradientMasker
from axolotl_gmt.tools.check.report import Mask
from axolotl_gmt.tools.check.validation import PARALLEL_SIZES


def count(model: torch.nn.Module, settings: GMTConfig) -> Mask:
    """What GMT masks of ``model``, whose tensors may lie on the meta device.

    Raises:
        ValueError: If nothing is trained, a pattern matches nothing that is, or the criterion
            cannot do with these parameters, as in training.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("unfrozen_parameters: nothing is trained. Change the patterns.")
    masker = GradientMasker(model.named_parameters(remove_duplicate=False), settings)
    optimizer = torch.optim.SGD(trained)
    masker.attach(optimizer).remove()  # Which checks the patterns.
    masked = [parameter for _, parameter in masker.masked_parameters(optimizer)]
    return Mask(
        len(masked), sum(p.numel() for p in masked), len(trained), sum(p.numel() for p in trained)
    )


def model_on_meta(cfg: Mapping[str, Any]) -> PreTrainedModel:
    """The model that a validated config trains, without memory for its weights.

    Raises:
        OSError: If its config is neither a local folder nor in the cache of the hub.
    """
    options = {"revision": cfg.get("revision_of_model"), "num_labels": cfg.get("num_labels")}
    config = transformers.AutoConfig.from_pretrained(
        cfg.get("base_model_config") or cfg["base_model"],
        local_files_only=True,
        trust_remote_code=False,
        **{key: value for key, value in options.items() if value is not None},
    )
    if cfg.get("trust_remote_code") and hasattr(config, "auto_map"):
        raise ValueError("the model's own code (trust_remote_code) decides, and is not run")
    for key, value in (cfg.get("overrides_of_model_config") or {}).items():
        setattr(config, key, value)
    # Other implementations may be fetched from the hub.
    options = {"attn_implementation": "eager", "experts_implementation": "eager"}
    name = cfg.get("type_of_model") or "AutoModelForCausalLM"
    with torch.device("meta"):
        if not name.startswith("Auto"):
            return getattr(transformers, name)._from_config(config, **options)
        if (
            name == "AutoModelForCausalLM"
            and type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        ):
            name = "AutoModelForImageTextToText"  # As Axolotl does.
        return getattr(transformers, name).from_config(config, trust_remote_code=False, **options)


def prepare_model(model: PreTrainedModel, cfg: DictDefault) -> torch.nn.Module:
    """Freeze parameters and add the adapter as Axolotl does with a validated config.

    Args:
        model: On the meta device, where shapes are all that there is; it is changed.
        cfg: As :func:`validation.validated` returns it.

    Raises:
        ValueError: If more than shapes is needed to tell what the config trains.
    """
    prepared: torch.nn.Module = model
    with torch.device("meta"):
        if cfg.get("adapter"):
            if cfg["adapter"] not in ("lora", "qlora") or cfg.get("lora_model_dir"):
                raise ValueError("only LoRA and QLoRA adapters that start anew are counted")
            _, config = load_lora(model, cfg, config_only=True)
            config.init_lora_weights, config.loftq_config = True, {}  # Others need the weights.
            prepared = get_peft_model(model, config)
        if cfg.get("unfrozen_parameters"):
            freeze_layers_except(prepared, cfg["unfrozen_parameters"])
        if cfg.get("freeze_mm_modules"):
            freeze_mm_modules(prepared)
    # Axolotl's muon for one GPU steps no vectors; muon_8bit and the one for several do.
    meshes = ("fsdp", "fsdp_config", "context_parallel_size", *PARALLEL_SIZES)
    if cfg.get("optimizer") == "muon" and all(cfg.get(key) in (None, False, 1) for key in meshes):
        for parameter in prepared.parameters():
            parameter.requires_grad &= parameter.ndim > 1
    return prepared
