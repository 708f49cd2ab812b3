"""The studio without a browser: its settings, its runs, and its page through gradio's own client."""

import json
import os
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # gradio's client would tell that it is used
pytest.importorskip("gradio", reason='the studio needs `pip install -e ".[studio]"`')

import gradio_client
from gradio_client.exceptions import AppError

from skipguide.cli.studio import app, clips, region
from skipguide.cli.studio.run import Run, Runs, Stopped
from skipguide.cli.studio.setting import Setting
from skipguide.cli.studio.shelf import Shelf
from skipguide.errors import SkipError
from skipguide.pipelines import bundled_pipeline, find_preset

pytestmark = pytest.mark.filterwarnings("default")  # of gradio about pandas: as errors they would end its server
PROMPT = "a large green star moving right"
# model, prompt, layers, scale, part, start, stop, w, steps, seed
ASKED = ["tiny-t2v", PROMPT, [5], 2.0, "attn_identity", 0.0, 1.0, 4.0, 2, 3]


@pytest.fixture(scope="module")
def outside():
    """Addresses off this machine that somebody tried to reach, and names that were looked up; every try fails."""
    tried, connect, look_up = [], socket.socket.connect, socket.getaddrinfo

    def guarded(self, address):
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            tried.append(address)
            raise OSError(f"no way to {address}")
        return connect(self, address)

    def local(host, *args, **kwargs):
        if host not in ("127.0.0.1", "::1", "localhost", None):
            tried.append(host)
            raise OSError(f"no way to {host}")
        return look_up(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded)
        patch.setattr(socket, "getaddrinfo", local)
        yield tried


@pytest.fixture(scope="module")
def address(outside):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with app.served() as found:
        yield found
    torch.set_num_threads(before)


def visitor(address, choose=True):
    """A visitor whose page has been loaded, which asks for the model's controls."""
    client = gradio_client.Client(address, verbose=False)
    if choose:
        client.predict("tiny-t2v", api_name="/choose")
    return client


@pytest.fixture
def client(address):
    return visitor(address)


def picture(path):
    return np.asarray(Image.open(path).convert("RGB"))


def compared(client, *changed, **named):
    """The last word, the middle frames, and the two costs."""
    said, plain, guided, plain_cost, guided_cost, *_ = client.predict(
        *ASKED[: len(ASKED) - len(changed)], *changed, api_name="/compare"
    )
    return said, picture(plain["value"]), picture(guided["value"]), plain_cost, guided_cost


def test_a_setting_is_plain_data():
    setting = Setting("tiny-t2v", PROMPT, [5, 6], scale=2)
    assert Setting.from_dict(json.loads(setting.to_json())) == setting
    assert setting.guidance == {"layers": [5, 6], "scale": 2.0, "part": "block", "start": 0.0, "stop": 1.0}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"prompt": " "}, "prompt in words"),
        ({"prompt": "a" * 3000}, "at most 2000 letters"),
        ({"model": ""}, "expected a model"),
        ({"steps": 0}, "1 to 200 steps"),
        ({"seed": -1}, "from 0 on"),
        ({"scale": float("nan")}, "scale"),
    ],
)
def test_what_no_pipeline_takes_is_refused(changed, words):
    with pytest.raises(SkipError, match=words):
        Setting(**{"model": "tiny-t2v", "prompt": PROMPT} | changed)


def test_a_run_tells_its_steps_and_can_be_stopped():
    done = Run(lambda tell: [tell(n, 3) for n in range(3)] and "made")
    assert list(done.steps()) == [(0, 3), (1, 3), (2, 3)]
    assert done.result == "made"
    runs, begun = Runs(), threading.Event()

    def endless(tell):
        while True:
            begun.set()
            tell(0, 1)
            time.sleep(0.01)

    run = runs.start("a", Run(endless))
    steps = run.steps()
    next(steps)
    assert not runs.stop("b") and runs.stop("a") and not runs.stop("a")
    with pytest.raises(Stopped):
        list(steps)
    with pytest.raises(ZeroDivisionError):
        list(Run(lambda tell: 1 / 0).steps())


def test_a_visitor_who_leaves_ends_the_run():
    ended = threading.Event()

    def work(tell):
        try:
            while True:
                tell(0, 1)
                time.sleep(0.01)
        finally:
            ended.set()

    steps = Run(work).steps()
    next(steps)
    steps.close()
    assert ended.wait(5)


def test_a_model_is_used_by_one_at_a_time_and_few_are_kept():
    loaded, waited = [], []
    shelf = Shelf(lambda name: loaded.append(name) or name, room=1)
    with shelf.using("a") as model:
        assert model == "a"

        def impatient():
            waited.append(1)
            raise Stopped

        with pytest.raises(Stopped), shelf.using("a", impatient):
            pass
    assert waited
    for name in ("a", "b", "a"):
        with shelf.using(name):
            pass
    assert loaded == ["a", "b", "a"]


def test_both_clips_and_what_they_cost(client):
    said, plain, guided, plain_cost, guided_cost = compared(client)
    assert said.startswith("done") and plain.shape == guided.shape == (256, 256, 3)
    assert (plain != guided).any()
    assert "(1.00 x plain)" in plain_cost and "32 blocks run" in plain_cost
    assert "38 blocks run (1.19 x plain)" in guided_cost  # attn_identity of block 5: it and the two behind it


def test_the_exported_program_makes_the_same_clip(client):
    compared(client)
    shown = picture(client.predict(9, api_name="/scrub")[1])
    program, data = client.predict(api_name="/export")
    assert Setting.from_dict(json.loads(data)) == Setting(*ASKED)
    space = {}
    exec(compile(program, "program", "exec"), space)
    frame = np.asarray(space["output"].frames[0][9]).repeat(4, 0).repeat(4, 1)
    assert (frame == shown).all()


def test_two_at_once_do_not_mix(address):
    alone = {}
    for seed in (11, 12):
        alone[seed] = compared(visitor(address), seed)
    found = {}

    def visit(seed):
        found[seed] = compared(visitor(address), seed)

    threads = [threading.Thread(target=visit, args=[seed]) for seed in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, before in alone.items():
        assert all((a == b).all() for a, b in zip(before[1:3], found[seed][1:3], strict=True))
    assert (alone[11][2] != alone[12][2]).any()


def test_stop_ends_a_run_and_the_next_one_works(client):
    job = client.submit(*ASKED[:8], 200, 0, api_name="/compare")
    while not job.done() and not any("step" in str(said[0]) for said in job.outputs()):
        time.sleep(0.05)
    assert client.predict(api_name="/stop") == "stopping ..."
    assert job.result()[0] == "stopped"
    assert compared(client)[0].startswith("done")
    assert client.predict(api_name="/stop") == "nothing runs"


def test_favourites_are_kept(client):
    compared(client)
    (first,) = client.predict(api_name="/keep")
    assert PROMPT in first["caption"] and "layers [5]" in first["caption"]
    assert len(client.predict(api_name="/keep")) == 2
    with pytest.raises(AppError, match="make a clip first"):
        visitor(client.src).predict(api_name="/keep")


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (0, "nope", "no model 'nope': expected tiny-t2v"),
        (0, "tiny-lm", "is not a diffusers pipeline"),
        (1, "", "expected a prompt in words"),
        (2, [99], "99"),
        (2, [], "choose a layer"),
        (5, 1.0, "start"),
    ],
)
def test_an_error_is_its_sentence(client, place, value, words):
    asked = [*ASKED]
    asked[place] = value
    with pytest.raises(AppError, match=words.replace("(", r"\(")) as found:
        client.predict(*asked, api_name="/compare")
    assert "Traceback" not in str(found.value)


def test_a_painted_region_is_left_out(client, tmp_path):
    ground, paint = tmp_path / "ground.png", tmp_path / "paint.png"
    region.example().save(ground)
    layer = Image.new("RGBA", (64, 64))
    layer.paste((225, 29, 72, 255), (16, 18, 48, 50))
    layer.save(paint)
    value = {
        "background": gradio_client.handle_file(ground),
        "layers": [gradio_client.handle_file(paint)],
        "composite": None,
    }
    said, answers = client.predict("tiny-cnn", value, api_name="/leave_out")
    assert "ring" in said and "25% of what the model sees" in said
    assert answers["data"][0][0] == "absent in every layer" and len(answers["data"]) == 6
    sheet = client.predict("tiny-cnn", value, "occlusion", "grid:4", api_name="/explain")
    assert picture(sheet).shape[1] > 800
    with pytest.raises(AppError, match="paint over the region"):
        client.predict("tiny-cnn", value | {"layers": []}, api_name="/leave_out")
    with pytest.raises(AppError, match="expected segments grid:N"):
        client.predict("tiny-cnn", value, "lime", "hexagons", api_name="/explain")


def test_an_upload_that_is_no_picture_is_refused(client, tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(AppError, match="is not a readable picture"):
        client.predict(gradio_client.handle_file(tmp_path / "a.png"), api_name="/upload")


def asked(address, name, *data):
    """What the server answers to somebody who speaks to it without the page."""
    where = f"{address.rstrip('/')}/gradio_api/call/{name}"
    body = json.dumps({"data": data}).encode()
    request = urllib.request.Request(where, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        event = json.load(answer)["event_id"]
    with urllib.request.urlopen(f"{where}/{event}") as answer:
        return answer.read().decode()


def test_files_of_the_machine_are_not_given_away(address, tmp_path):
    region.example().save(tmp_path / "a.png")
    for path in ("/etc/hostname", str(tmp_path / "a.png"), str(Path(__file__).resolve())):
        file = {"path": path, "meta": {"_type": "gradio.FileData"}}
        assert "not uploaded by a user" in asked(address, "upload", file)
        assert "not uploaded by a user" in asked(
            address, "leave_out", "tiny-cnn", {"background": file, "layers": [], "composite": None}
        )
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{address.rstrip('/')}/gradio_api/file={path}")
        assert refused.value.code in (403, 404)


@pytest.mark.parametrize("path", ["https://example.com/a.png", "HTTP://127.0.0.1/a.png"])
def test_no_file_is_fetched_from_an_address(address, path):
    with pytest.raises(urllib.error.HTTPError) as refused:
        asked(address, "upload", {"path": path, "meta": {"_type": "gradio.FileData"}})
    assert refused.value.code == 400 and b"fetches none from an address" in refused.value.read()
    assert "event: error" in asked(address, "compare", "", "see https://example.com")  # words may name one


def test_an_upload_that_is_too_large_is_refused(client, tmp_path):
    (tmp_path / "a.png").write_bytes(bytes(app.LARGEST_UPLOAD + 1))
    with pytest.raises(Exception, match=r"(?i)413|large|size"):
        client.predict(gradio_client.handle_file(tmp_path / "a.png"), api_name="/upload")


def test_nothing_is_written_outside_its_folder(address):
    folder, written = os.environ["GRADIO_TEMP_DIR"], []
    client = gradio_client.Client(address, verbose=False, download_files=False)

    def watch(event, args):
        if event == "open" and isinstance(args[0], str) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            watching.append(args[0])
        if event in ("os.mkdir", "os.rename", "os.remove", "os.symlink", "os.truncate"):
            watching.extend(str(each) for each in args if isinstance(each, (str, os.PathLike)))

    watching = written
    sys.addaudithook(watch)  # cannot be taken off again: afterwards it fills a list that nobody reads
    try:
        client.predict("tiny-t2v", api_name="/choose")
        client.predict(*ASKED, api_name="/compare")
        client.predict(api_name="/keep")
        client.predict("tiny-lm", "def main(", 2, 4, api_name="/rank")
    finally:
        watching = []
    own = (folder, "/dev/", "/proc/")
    assert any(path.startswith(folder) for path in written)
    assert not [path for path in written if not path.startswith(own) and "__pycache__" not in path]


def test_sublayers_are_ranked_and_left_out(client):
    ranking, whole, other, said = client.predict("tiny-lm", "def main(", 4, 12, api_name="/rank")
    rows = ranking["data"]
    assert len(rows) == 24 and [row[0] for row in rows] == list(range(1, 25))
    assert [row[5] for row in rows].count("left out") == 4
    assert whole.startswith("def main(") and other.startswith("def main(") and "% of the sublayers left out" in said
    assert client.predict("tiny-lm", "def main(", 0, 12, api_name="/rank")[3] == "nothing is left out"


def test_the_page_loads_nothing_from_elsewhere(address, outside):
    with urllib.request.urlopen(address) as answer:
        policy, text = answer.headers["content-security-policy"], answer.read().decode()
    assert "default-src 'self'" in policy and "http:" not in policy and "https:" not in policy
    assert "fonts.googleapis" not in text and "cdnjs" not in text
    request = urllib.request.Request(address, headers={"Host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    assert refused.value.code == 421
    assert outside == []


def test_it_listens_on_this_machine_only(address):
    import psutil

    port = int(address.rstrip("/").rsplit(":", 1)[1])
    listening = [
        c.laddr.ip for c in psutil.Process().net_connections() if c.status == "LISTEN" and c.laddr.port == port
    ]
    assert listening == ["127.0.0.1"]


def test_its_folder_is_gone_afterwards(monkeypatch):
    seen = []
    build = app.build
    monkeypatch.setattr(app, "build", lambda folder, model: seen.append(folder) or build(folder, model))
    with app.served():
        assert seen[0].is_dir()
    assert not seen[0].exists()


def test_the_controls_are_the_models(client):
    client = visitor(client.src, choose=False)
    layers, scale, part, w, steps, words = client.predict("tiny-t2v", api_name="/choose")
    pipe, call = bundled_pipeline()
    preset = find_preset(pipe.transformer)
    assert len(layers["choices"]) == 8 and layers["value"] == list(preset.layers)
    assert scale == preset.scale and part["value"] == preset.part
    assert (w, steps) == (call["guidance_scale"], call["num_inference_steps"]) and "8 blocks" in words
    again = client.predict("tiny-t2v", api_name="/choose")  # who only looked at the name keeps what was set
    assert not any(each.get("value") for each in again if isinstance(each, dict))


def test_a_pipeline_without_a_callback_is_sampled_too():
    class Plain:
        def __call__(self, prompt):
            pass

    assert clips._following(Plain(), 3, lambda *_: None) == {}
