"""Llama 3, 3.1 and 3.2. Imports no torch."""

from models.llama3.args import FLAVORS
from models.llama3.plan import build_plan
from models.registry import ModelSpec

SPEC = ModelSpec(
    name="llama3",
    flavors=FLAVORS,
    build_plan=build_plan,
    model_class="models.llama3.model:Transformer",
    adapter_class="models.llama3.state_dict_adapter:Llama3Adapter",
)
