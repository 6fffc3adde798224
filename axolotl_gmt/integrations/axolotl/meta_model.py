"""The model that a config trains, on the meta device: names and shapes, without weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from axolotl.integrations.base import normalize_plugin_name
from axolotl.loaders.adapter import load_lora
from axolotl.utils.dict import DictDefault
from axolotl.utils.freeze import freeze_layers_except, freeze_mm_modules
from peft import get_peft_model
from transformers import PreTrainedModel

from axolotl_gmt.integrations.axolotl.args import read_config
from axolotl_gmt.integrations.axolotl.raw_config import PARALLEL_SIZES, PLUGIN_NAMES
from axolotl_gmt.masking.masker import GradientMasker

# Keys with which a training may have other parameters than the config of its model says.
_UNSURE = (
    "deepspeed",  # Under ZeRO-3 a model is sharded while it is made, also this one.
    "is_multimodal",
    "model_quantization_config",
    "process_reward_model",
    "quantize_moe_experts",
    "reward_model",
)
# Integrations of Axolotl that replace computations, and no parameters.
_KERNELS = ("axolotl.integrations.cut_cross_entropy.", "axolotl.integrations.liger.")


def check_patterns(cfg: DictDefault) -> None:
    """Refuse patterns that match no parameter, before a training reads weights.

    Where the names are not known for sure, nothing is said: the masker checks the patterns again
    when it is attached.

    Args:
        cfg: As Axolotl's ``validate_config`` returns it.

    Raises:
        ValueError: Naming the setting, the pattern and the fix.
    """
    settings = read_config(cfg)
    if not (settings.include or settings.exclude) or not _names_are_sure(cfg):
        return
    try:
        with torch.random.fork_rng(devices=[]):  # The training draws what it would have drawn.
            model = prepare_model(model_on_meta(cfg), cfg)
    except Exception:  # As in a check: configs of models raise errors of nearly every kind.
        return
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if trained:
        # A criterion of somebody else's is asked once, when training begins.
        patterns = settings.model_copy(update={"criterion": "gradient"})
        masker = GradientMasker(model.named_parameters(remove_duplicate=False), patterns)
        masker.attach(torch.optim.SGD(trained)).remove()


def _names_are_sure(cfg: DictDefault) -> bool:
    plugins = [normalize_plugin_name(name) for name in cfg.get("plugins") or []]
    return (
        cfg.get("type_of_model") in (None, "AutoModelForCausalLM")
        and not any(cfg.get(key) for key in _UNSURE)
        and all(name in PLUGIN_NAMES or name.startswith(_KERNELS) for name in plugins)
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
        cfg: As Axolotl's ``validate_config`` returns it.

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
