"""DeepSeek-V3 and V2. Imports no torch."""

from models.deepseek_v3.args import FLAVORS
from models.deepseek_v3.plan import build_plan
from models.registry import ModelSpec

SPEC = ModelSpec(
    name="deepseek_v3",
    flavors=FLAVORS,
    build_plan=build_plan,
    model_class="models.deepseek_v3.model:Transformer",
    adapter_class="models.deepseek_v3.state_dict_adapter:DeepSeekV3Adapter",
)
