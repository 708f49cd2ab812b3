"""`skipguide describe` on tiny random models."""

import pytest
from helpers.cli_stub import one_line

from skipguide.cli import main, models
from zoo import saved

tiny = saved.tiny


@pytest.mark.parametrize("part", ["", "transformer"])
def test_describe_lists_every_block_without_reading_weights(tiny, part, capsys, monkeypatch):
    monkeypatch.setattr(models, "load_pipeline", None)
    assert main(["describe", f"{tiny}/{part}".rstrip("/")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{part or 'transformer'}: LatteTransformer3DModel, 6 blocks" if not part else "model:")
    table = [line.split() for line in lines[3:9]]
    assert [row[0] for row in table] == list("012345")
    assert [row[1] for row in table[:2]] == ["transformer_blocks.0", "temporal_transformer_blocks.0"]
    assert table[0][2:5] == ["attn", "cross_attn", "mlp"]
    assert table[1][2:4] == ["attn", "mlp"]
    assert [row[-3] for row in table] == ["5/6", "4/6", "3/6", "2/6", "1/6", "0/6"]
    assert table[0][-1] == f"x{1 + 5 / 12:.2f}"
    assert len({line.index("transformer_blocks") for line in lines[3:9:2]}) == 1, "aligned"
    assert any("skipguide sweep" in line for line in lines), "no preset: says what finds one"


def test_describe_marks_the_preset(tmp_path, capsys):
    from diffusers import LTXVideoTransformer3DModel

    model = LTXVideoTransformer3DModel(
        num_layers=28, in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8
    )
    model.save_config(tmp_path)
    assert main(["describe", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines() if "*" in line] == ["19*", "preset"]
    assert "preset (*): layer 19, scale 1 (STG authors' code" in out


def test_describe_says_what_it_saw_in_a_model_it_does_not_know(tmp_path, capsys):
    from diffusers import PriorTransformer

    PriorTransformer(num_attention_heads=2, attention_head_dim=8, num_layers=3, embedding_dim=8).save_config(tmp_path)
    one_line(capsys, 2, "transformer_blocks (3 x BasicTransformerBlock)", "describe", str(tmp_path))
