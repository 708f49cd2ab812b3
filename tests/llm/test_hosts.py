"""Language models in other libraries' hands: offloaded weights, quantised caches, prompt tuning of PEFT."""

import accelerate
import pytest
import torch
from helpers import llm_zoo
from helpers.llm_zoo import CACHE
from peft import PromptTuningConfig, TaskType, get_peft_model
from transformers import cache_utils

from skipguide import SkipError, check
from skipguide.hosts.accelerate import execution_device
from skipguide.hosts.kv_cache import layer_bytes
from skipguide.llm import AdaSkip, SelfSpeculative, SublayerPlan
from skipguide.llm.cost import measure_costs

# of PEFT and transformers, about each other
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{words}") for words in ("Position ids are not supported", "`is_gradient_checkp")
]

LLAMA = llm_zoo.BY_NAME["llama"]
IDS = llm_zoo.prompt(batch=1, tokens=12)
GREEDY = {"max_new_tokens": 8, "do_sample": False}


def offloaded():
    return accelerate.cpu_offload(LLAMA.build(), execution_device=torch.device("cpu"))


def test_an_offloaded_model_is_measured_and_skips():
    model, plain = offloaded(), LLAMA.build()
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert execution_device(model) == torch.device("cpu")
    stats, expected = (AdaSkip.calibrate(each, [IDS]) for each in (model, plain))
    assert stats.attn_similarity == pytest.approx(expected.attn_similarity, abs=1e-5)
    assert measure_costs(model, 8, repeats=1).device == "cpu"
    policies = (
        lambda each: AdaSkip(count=2, cost_aware=True).apply(each, stats, measure_costs(plain, 8, repeats=1)),
        lambda each: AdaSkip(count=2).apply(each),
        lambda each: SelfSpeculative().apply(each),
    )
    for apply in policies[1:]:
        texts = []
        for each in (model, plain):
            with apply(each):
                texts.append(each.generate(IDS, **GREEDY))
        assert torch.equal(*texts)
    with policies[0](model) as applied:
        model.generate(IDS, **GREEDY)
        assert applied.stats.skipped_fraction > 0
    assert check(model).blocks == 4


def test_a_model_whose_weights_nobody_loads():
    with torch.device("meta"):
        model = torch.nn.Linear(2, 2)
    with pytest.raises(SkipError, match="no hook of accelerate loads them"):
        execution_device(model)
    assert execution_device(torch.nn.Identity()) == torch.device("cpu")


class EightBits(cache_utils.QuantizedLayer):
    """One scale for all: a tensor of bytes and its scale, as a backend keeps them."""

    def _quantize(self, tensor, axis):
        scale = tensor.abs().max() / 127
        return (tensor / scale).round().to(torch.int8), {"scale": scale}

    def _dequantize(self, held):
        return held[0].float() * held[1]["scale"]


def test_bytes_of_a_quantised_cache():
    """The prompt's keys are in the quantised part, not in `keys`: 12 tokens of 2 heads of 8, a byte each, and 4."""
    model = LLAMA.build()
    layer_size = 2 * (12 * 2 * 8 + 4)
    with SublayerPlan(attn=[0, 2]).apply(model) as applied:
        cache = cache_utils.Cache(layers=[EightBits() for _ in range(4)])
        model(IDS, **{CACHE: cache})
        assert layer_bytes(cache.layers[1]) == layer_size and layer_bytes(cache.layers[0]) == 0
        assert applied.stats.kv_bytes == applied.stats.kv_bytes_saved == 2 * layer_size
        model(IDS[:, :1], **{CACHE: cache})
        assert applied.stats.kv_bytes_saved == 2 * (layer_size + 2 * 2 * 8 * 4), "the latest are not quantised yet"


def test_bytes_of_tensors_made_of_tensors():
    class Wrapped(torch.Tensor):
        @staticmethod
        def __new__(cls, data):
            return torch.Tensor._make_wrapper_subclass(cls, (4, 4), dtype=torch.float32)

        def __init__(self, data):
            self._data, self._scale = data, torch.ones(2)

        def __tensor_flatten__(self):
            return ["_data", "_scale"], None

        @classmethod
        def __torch_dispatch__(cls, *_):
            raise NotImplementedError

    class Layer:
        keys = values = None
        _quantized_keys = _quantized_values = Wrapped(torch.zeros(8, dtype=torch.uint8))

    assert layer_bytes(Layer()) == 2 * (8 + 8)


def tuned():
    torch.manual_seed(0)
    return get_peft_model(LLAMA.build(), PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3)).eval()


@pytest.mark.parametrize("plan", [SublayerPlan(mlp=[1, 2]), None], ids=["a plan", "chosen"])
def test_virtual_tokens_in_every_pass_cannot_be_verified(plan):
    with pytest.raises(SkipError, match=r"put \d+ into the KV cache"):
        SelfSpeculative(plan=plan, adaptive=plan is None).generate(tuned(), input_ids=IDS, **GREEDY)


def test_a_decode_plan_skips_where_virtual_tokens_come_with_every_token():
    model = tuned()
    with SublayerPlan(mlp=[1, 2], phase="decode").apply(model) as applied:
        model.generate(input_ids=IDS, **GREEDY)
    assert applied.stats.skips == {f"model.layers.{i}.mlp": 7 for i in (1, 2)}
