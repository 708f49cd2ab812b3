"""Layer masking: no trace is left, and threads do not see each other's masks."""

import pickle
import threading
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torchvision.models.resnet import BasicBlock

from skipguide.vision import LayerMask, masked_forward
from zoo import masking
from zoo.masking import state, tiny, vit

model, images, keep = masking.model, masking.images, masking.keep


def test_no_trace_is_left(images, keep):
    model = tiny(BasicBlock)
    before, keys, plain = state(model), list(model.state_dict()), model(images)
    with LayerMask(keep).apply(model):
        model(images)
        assert not torch.equal(model(images), plain)
    assert state(model) == before and list(model.state_dict()) == keys
    assert torch.equal(model(images), plain)
    applied = LayerMask(keep).apply(model)
    applied.remove()
    applied.remove()
    assert state(model) == before

    def fail(module, args):
        raise RuntimeError("stop")

    hook = model.layer3.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stop"), LayerMask(keep).apply(model):
        model(images)
    hook.remove()
    assert state(model) == before and torch.equal(model(images), plain)
    masked_forward(model)(keep, images)
    assert state(model) == before
    pickle.dumps(model)
    assert not any(hasattr(p, "_skipguide_activation") for p in (*model.parameters(), *model.buffers(), images, keep))


@torch.no_grad()
@pytest.mark.parametrize("shape", [tuple, list, dict, namedtuple("Answer", "logits features")._make])
def test_an_answer_is_a_plain_tensor_in_whatever_it_comes(model, images, keep, shape):
    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, images):
            features = self.model.layer1(self.model.conv1(images))
            given = features.mean((2, 3)), features
            return dict(enumerate(given)) if shape is dict else shape(given)

    forward = masked_forward(Both().eval())
    answers = []
    for _ in range(2):  # traced, and planned on a part of the picture
        answer = forward(keep, images)
        assert type(answer) is type(shape({0: 1, 1: 2}) if shape is dict else shape((1, 2)))
        answers.append(list(answer.values() if shape is dict else answer))
    for first, again in zip(*answers, strict=True):
        assert not first.__dict__ and not again.__dict__  # what is kept, or saved, is not the run with its masks
        assert torch.allclose(first, again, atol=1e-5)


@torch.no_grad()
def test_threads_have_their_own_masks(model, images):
    masks = [torch.zeros(1, 64, 64, dtype=torch.bool) for _ in range(4)]
    for number, mask in enumerate(masks):
        mask[:, 8 * number : 8 * number + 30, 10:50] = True
    wanted = [masked_forward(model)(mask, images) for mask in masks]
    found = [None] * 4

    def work(number):
        with torch.no_grad():
            found[number] = [masked_forward(model)(masks[number], images) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, answers in zip(wanted, found, strict=True):
        for answer in answers:
            torch.testing.assert_close(answer, ours, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_threads_drop_their_own_tokens(images):
    forward = masked_forward(vit())
    masks = [torch.zeros(1, 64, 64, dtype=torch.bool) for _ in range(4)]
    for number, mask in enumerate(masks):
        mask[:, : 16 * number + 9, 16 * number :] = True
    wanted = [forward(mask, images) for mask in masks]
    start = threading.Barrier(4, timeout=600)

    def work(number):
        with torch.no_grad():
            start.wait()
            return [forward(masks[number], images) for _ in range(20)]

    with ThreadPoolExecutor(4) as pool:
        for ours, answers in zip(wanted, pool.map(work, range(4)), strict=True):
            for answer in answers:
                torch.testing.assert_close(answer, ours, rtol=1e-5, atol=1e-5)
    assert not [name for name, module in forward.model.named_modules() if "forward" in module.__dict__]
