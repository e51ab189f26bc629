"""Sections about low precision. See `schema.py`."""

from dataclasses import dataclass, field
from typing import Literal

FLOAT8_CONVERTERS = frozenset({"quantize.linear.float8", "float8"})
"""Names of one conversion in `model.converters`."""

FLOAT8_EXPERTS_CONVERTER = "quantize.grouped_mm.float8"
"""Name of the conversion of experts."""

SPEED_FILTER = "auto_filter_by_speed"
"""In `filter_fqns`: leave out what measured times say is not faster."""

FLOAT8_ALIGNMENT = 16
"""What a GPU's float8 products want dims to be multiples of: both of the second factor, and the one that is summed over."""

OPT_LEVELS: dict[str, dict[str, str]] = {
    "O1": {"training.gradient_wire_dtype": "float8"},
    "O2": {"training.gradient_wire_dtype": "float8", "optimizer.state_dtype": "float8"},
}
"""What `fp8_opt_level` stands for, beside the products in float8 that the converter brings."""


@dataclass(frozen=True)
class Float8LinearConfig:
    """Linear layers in float8, with `model.converters = ["quantize.linear.float8"]`."""

    backend: Literal["native", "te"] = "native"
    """Whose layers multiply: native, this program's; te, those of NVIDIA's TransformerEngine, by tensorwise (there: current scaling) or delayed scaling, without compilation, recomputation, tensor or pipeline parallelism."""
    recipe_name: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp", "delayed", "static"] | None = None
    """How tensors are scaled. tensorwise (also if unset): one scale for each, by what it holds now; rowwise: one for each row; rowwise_with_gw_hp: so too, with gradients of weights in high precision, the most accurate; delayed: one for each tensor, by what it held in past steps; static: one for each tensor, given beforehand."""
    scaling_type_input: Literal["dynamic", "delayed", "static"] | None = None
    """Scaling of inputs, where it is to be another than recipe_name says. Not for the rowwise recipes."""
    scaling_type_weight: Literal["dynamic", "delayed", "static"] | None = None
    """The same, of weights."""
    scaling_type_grad_output: Literal["dynamic", "delayed", "static"] | None = None
    """The same, of gradients of outputs."""
    amax_history_len: int = 16
    """delayed: steps whose largest magnitudes are remembered."""
    amax_compute_algo: Literal["max", "most_recent"] = "max"
    """delayed: scale by the largest of those steps, or by the last one."""
    margin: int = 0
    """delayed, and scales that are written: powers of two that are left free above the largest magnitude."""
    delayed_warmup_steps: int = 10
    """delayed: steps at the beginning that scale by what a tensor holds, while the history begins."""
    static_scale_input: float | None = None
    """static: scale of the inputs of all layers."""
    static_scale_weight: float | None = None
    """static: scale of all weights."""
    static_scale_grad_output: float | None = None
    """static: scale of the gradients of all outputs."""
    static_scales_file: str | None = None
    """static: file with the scales of each layer, as write_scales_file makes it."""
    write_scales_file: str | None = None
    """Write to this file, at the end of the run, the scales that would just have held all that was seen in it, layer by layer."""
    filter_fqns: list[str] = field(default_factory=list)
    """Layers, by part of their name, that stay in high precision. auto_filter_small_kn stands for those that are too small to become faster, auto_filter_by_speed for those that measured times (speed_table) say are not faster. The output matrix always stays."""
    keep_first_blocks: int = 0
    """Blocks at the beginning of the model whose layers stay in high precision."""
    keep_last_blocks: int = 0
    """The same, at the end."""
    speed_table: str | None = None
    """auto_filter_by_speed: CSV with measured times by tokens, features in and features out, as scripts/float8_matmul.py makes it. If unset, that for this GPU in trainer/low_precision/speed_tables."""
    enable_fsdp_float8_all_gather: bool = False
    """FSDP: cast weights before they are gathered, which halves the traffic. tensorwise only."""
    precompute_float8_dynamic_scale_for_fsdp: bool = False
    """With the former: get the scales of all weights by one all-reduce after each step, rather than by one for each weight."""
    emulate: bool = False
    """Round as float8 does, but multiply in float32, on any device: to try a recipe, slowly."""
    pad_inner_dim: bool = False
    """Pad the dim that a product sums over to a multiple of 16, for batches whose number of tokens is none."""
    force_recompute_fp8_weight_in_bwd: bool = False
    """Cast weights again in the backward pass, rather than keep what was cast in the forward pass, one byte a parameter."""
    round_scales_to_power_of_2: bool = False
    """Round scales down to powers of two. The rowwise recipes always do."""
    fused_cast: Literal["never", "gradients", "all"] = "gradients"
    """Cast a tensor by rows and by columns, and find its largest magnitude, in one kernel: gradients of outputs, which are needed both ways at once, or inputs, too, which are then kept for the backward pass, a byte an element, rather than cast again. With either, a feed-forward part with one scale a tensor computes as one function, in which one kernel each way does all that is between the products. never: leave it to the compiler."""
    fp8_opt_level: Literal["O1", "O2"] | None = None
    """MS-AMP's levels. O1: gradients travel in float8, too (training.gradient_wire_dtype = float8). O2: also, the moments of AdamW are kept in float8 and bfloat16 (optimizer.state_dtype = float8)."""
    measure_freq: int = 0
    """Steps from one measurement to the next, of those that are logged: amax, scale, and shares of values too large or too small for it, of each layer's tensors. Compiled blocks have another graph for such steps. 0 turns it off."""


@dataclass(frozen=True)
class MXLinearConfig:
    """Linear layers in MX formats."""

    mxfp8_dim1_cast_kernel_choice: str = "triton"
    """Kernel of the cast along dim 1."""
    recipe_name: str = "mxfp8_cublas"
    """Recipe."""
    filter_fqns: list[str] = field(default_factory=lambda: ["output"])
    """Layers, by part of their name, that stay in high precision."""


@dataclass(frozen=True)
class QuantizeLinearConfig:
    """Low precision for linear layers."""

    float8: Float8LinearConfig = field(default_factory=Float8LinearConfig)
    mx: MXLinearConfig = field(default_factory=MXLinearConfig)


@dataclass(frozen=True)
class Float8GroupedMMConfig:
    """Experts in float8, by rows, with gradients of weights in high precision: `model.converters = ["quantize.grouped_mm.float8"]`."""

    fqns: list[str] = field(default_factory=list)
    """Experts, by part of their name, that are converted: ["experts"] for all."""
    emulate: bool = False
    """Round as float8 does, but multiply in float32, on any device: to try it, slowly."""
    measure_freq: int = 0
    """As quantize.linear.float8.measure_freq, of the products of experts."""


@dataclass(frozen=True)
class MXGroupedMMConfig:
    """Experts in MX formats."""

    recipe_name: str = "mxfp8"
    """Recipe."""
    fqns: list[str] = field(default_factory=list)
    """Modules, by part of their name, whose experts are converted."""


@dataclass(frozen=True)
class QuantizeGroupedMMConfig:
    """Low precision for grouped matmuls."""

    float8: Float8GroupedMMConfig = field(default_factory=Float8GroupedMMConfig)
    mx: MXGroupedMMConfig = field(default_factory=MXGroupedMMConfig)


@dataclass(frozen=True)
class QuantizeConfig:
    """Low precision, by kind of operation."""

    linear: QuantizeLinearConfig = field(default_factory=QuantizeLinearConfig)
    grouped_mm: QuantizeGroupedMMConfig = field(default_factory=QuantizeGroupedMMConfig)
