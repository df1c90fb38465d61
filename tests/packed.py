"""Checkpoints of tiny networks in compressed-tensors formats, written by that library."""

import copy
from pathlib import Path

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from torch import nn
from transformers import PreTrainedModel

import tiny
from divergent_tokens.quiet import quietly


def write(
    folder: Path,
    network: PreTrainedModel,
    groups: dict[str, QuantizationScheme],
    ignore: tuple[str, ...] = ("lm_head",),
) -> Path:
    """Quantize a copy of a network by the largest weights, and save it with the tokenizer."""
    network = copy.deepcopy(network)
    config = QuantizationConfig(config_groups=groups, ignore=list(ignore))
    with quietly(), torch.no_grad():
        apply_quantization_config(network, config)
        for module in network.modules():
            scheme = getattr(module, "quantization_scheme", None)
            if scheme is not None and scheme.weights is not None:
                _set_scales(module, scheme.weights)
        compressor = ModelCompressor.from_pretrained_model(network)
        compressor.compress_model(network)
        network.save_pretrained(folder)
        compressor.update_config(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def _set_scales(module: nn.Module, args: QuantizationArgs) -> None:
    weight = module.weight.detach()
    if args.strategy == "tensor":
        groups = weight.reshape(1, -1)
    else:
        groups = weight.reshape(len(weight), -1, args.group_size or weight.shape[1])
    low, high = groups.amin(-1), groups.amax(-1)
    whole = None
    if args.strategy == "tensor_group":
        whole = generate_gparam(low.amin(), high.amax())
        module.weight_global_scale.data = whole
    scale, zero_point = calculate_qparams(low, high, args, global_scale=whole)
    module.weight_scale.data = scale.reshape(module.weight_scale.shape).to(module.weight_scale)
    if hasattr(module, "weight_zero_point"):
        module.weight_zero_point.data = zero_point.reshape(module.weight_zero_point.shape)
    module.quantization_status = QuantizationStatus.FROZEN
