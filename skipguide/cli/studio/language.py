"""Language: the tab that ranks a language model's sublayers and writes without the first of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gradio

from skipguide.cli import llm_models
from skipguide.cli.studio.shelf import Shelf
from skipguide.cli.studio.told import told
from skipguide.errors import SkipError

if TYPE_CHECKING:
    from skipguide.cli.llm_models import LanguageModel

LONGEST, MOST_TOKENS = 4000, 200


def load(name: str) -> LanguageModel:
    """A language model by what a visitor calls it."""
    return llm_models.load(name, "auto", "auto")


class LanguageTab:
    """The handlers of the tab.

    Args:
        shelf: of language models.
    """

    def __init__(self, shelf: Shelf[LanguageModel]) -> None:
        self.shelf = shelf

    @told
    def write(self, model: str, prompt: str, count: int, tokens: int) -> tuple[list[list[Any]], str, str, str]:
        """Rank the sublayers on the prompt, leave out the first `count`, and write with and without them.

        Returns:
            The ranking; the whole model's text; the text without; what it took and how far the two are apart.
        """
        from skipguide.llm import AdaSkip
        from skipguide.llm.agreement import agreement

        if not prompt.strip() or len(prompt) > LONGEST:
            raise SkipError(f"expected a prompt of 1 to {LONGEST} letters; got {len(prompt)}")
        count, tokens = int(count), int(tokens)
        if not 1 <= tokens <= MOST_TOKENS:
            raise SkipError(f"expected 1 to {MOST_TOKENS} tokens; got {tokens}")
        with self.shelf.using(model.strip()) as lm:
            ids = lm.encode(prompt)
            stats = AdaSkip.calibrate(lm.model, [ids])
            whole = self._written(lm, ids, tokens)
            if count == 0:
                return rows(stats, ()), lm.tokenizer.decode(whole[0]), "", "nothing is left out"
            policy = AdaSkip(count=count, online=False, compensate=_scalable(lm))
            left_out = {*((layer, "attn") for layer in policy.choose(stats).attn)}
            left_out |= {(layer, "mlp") for layer in policy.choose(stats).mlp}
            with policy.apply(lm.model, stats) as applied:
                other = self._written(lm, ids, tokens)
            said = f"{applied.stats.skipped_fraction:.0%} of the sublayers left out"
            found = agreement(lm.model, whole, ids.shape[1], lambda same: policy.apply(same, stats))
            said += f"; on the whole model's text the two find the same next token {found.top1:.0%} of the time"
            return rows(stats, left_out), lm.tokenizer.decode(whole[0]), lm.tokenizer.decode(other[0]), said

    @staticmethod
    def _written(lm: LanguageModel, ids: Any, tokens: int) -> Any:
        return lm.model.generate(ids, max_new_tokens=tokens, do_sample=False, pad_token_id=lm.tokenizer.eos_token_id)


def _scalable(lm: LanguageModel) -> bool:
    from skipguide.llm import sublayer_map

    return sublayer_map(lm.model).scalable


def rows(stats: Any, left_out: Any) -> list[list[Any]]:
    """The ranking: rank, layer, part, similarity, scale, whether it is left out."""
    return [
        [place, layer, part, round(similarity, 4), round(scale, 3), "left out" if (layer, part) in left_out else ""]
        for place, (layer, part, similarity, scale) in enumerate(stats.ranked(), 1)
    ]


def build(tab: LanguageTab) -> None:
    """Lay out the tab, inside the page."""
    with gradio.Row():
        with gradio.Column(scale=1):
            model = gradio.Textbox("tiny-lm", label="model: tiny-lm, a folder, a hub id, or a .gguf file", elem_id="lm")
            prompt = gradio.Textbox("def read_lines(path):\n    ", lines=5, label="prompt", elem_id="lm-prompt")
            count = gradio.Slider(0, 48, 3, step=1, label="sublayers to leave out, the most similar first")
            tokens = gradio.Slider(1, MOST_TOKENS, 40, step=1, label="tokens to write")
            go = gradio.Button("Rank and write", variant="primary", elem_id="rank")
            said = gradio.Markdown("", elem_id="lm-said")
            table = gradio.Dataframe(
                headers=["rank", "layer", "part", "similarity", "scale", ""],
                interactive=False,
                label="sublayers: similarity of the stream before and after (1: it does nothing)",
                elem_id="ranking",
            )
        with gradio.Column(scale=1):
            whole = gradio.Textbox(label="the whole model", lines=12, interactive=False, elem_id="whole-text")
            other = gradio.Textbox(label="with sublayers left out", lines=12, interactive=False, elem_id="other-text")
    go.click(tab.write, [model, prompt, count, tokens], [table, whole, other, said], api_name="rank")
