"""hart-batch in one process: rows, seeds, the table, what is refused, and runs that go on."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hart_runtime.batch.cluster import Node, check_nodes
from hart_runtime.batch.output import PER_FOLDER, Finished, Run, open_output
from hart_runtime.batch.plan import make_plan
from hart_runtime.batch.progress import Rate, sentence
from hart_runtime.batch.rows import read_rows
from hart_runtime.common.errors import InputError
from hart_runtime.runtime.manifest import read_manifest
from hart_runtime.runtime.memory.forecast import PROCESS, needed
from hart_runtime.runtime.memory.needs import SHARE, Needs, actors_for, device_for, needs_of, without
from tests.batches import FEW, batch, check_whole, drawn, hart_run, journal, pictures, started, table
from tests.test_bundle import poisoned

PROMPTS = ["a red circle on a white background", "a blue star", "a green ring"]
RUN = Run("p", "b", "cpu", "auto", False, "1")


def written(file: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows in the format of a file's ending."""
    if file.suffix == ".txt":
        file.write_text("\n\n".join(row["prompt"] for row in rows) + "\n")
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif file.suffix == ".csv":
        names = list(rows[0])
        lines = [",".join("" if row[n] is None else f'"{row[n]}"' for n in names) for row in rows]
        file.write_text("\n".join([",".join(names), *lines]))
    else:
        pq.write_table(pa.Table.from_pylist(rows), file)
    return file


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "parquet"])
def test_every_format_draws_what_hart_run_draws(demo_bundle: Path, tmp_path: Path, kind: str) -> None:
    file = written(tmp_path / f"prompts.{kind}", [{"prompt": prompt} for prompt in PROMPTS])
    done = drawn(file, "--engine", demo_bundle, "--output", tmp_path / "out", *FEW)
    assert done.stdout == f"{tmp_path / 'out' / 'table.parquet'}\n"
    files = check_whole(tmp_path / "out", 3)
    for number, prompt in enumerate(PROMPTS):
        assert files[number] == hart_run(demo_bundle, tmp_path, prompt, "--seed", number, *FEW)


def test_seeds_counts_and_settings_of_rows(demo_bundle: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": PROMPTS[0], "seed": None, "count": 2, "guidance": None, "smooth": None},
        {"prompt": PROMPTS[1], "seed": 7, "count": None, "guidance": 2.5, "smooth": False},
        {"prompt": PROMPTS[2], "seed": 0, "count": 2, "guidance": 3, "smooth": True},
        {"prompt": PROMPTS[2], "seed": None, "count": None, "guidance": None, "smooth": None},
    ]
    expected = [(0, 100), (0, 101), (1, 7), (2, 0), (2, 1), (3, 105)]
    plans = []
    for kind in ("jsonl", "csv", "parquet"):
        file = written(tmp_path / f"prompts.{kind}", rows)
        manifest, _ = read_manifest(demo_bundle)
        plans.append(make_plan(read_rows(file), file, manifest, seed=100, steps="2"))
        assert [(p.row, p.seed) for p in plans[-1].pictures] == expected
    assert plans[0] == plans[1] == plans[2]
    assert len({plan.sha256 for plan in plans}) == 1
    words = ("--engine", demo_bundle, "--seed", 100, "--batch", 3, *FEW)
    drawn(tmp_path / "prompts.csv", *words, "--output", tmp_path / "out")
    files = check_whole(tmp_path / "out", 6)
    settings = json.loads(table(tmp_path / "out")[2]["settings"])
    assert (settings["guidance"], settings["smooth"], settings["steps"]) == (2.5, False, "2")
    for number, options in {
        1: [],
        2: ["--guidance", 2.5, "--no-smooth"],
        4: ["--guidance", 3, "--smooth"],
    }.items():
        row = table(tmp_path / "out")[number]
        alone = hart_run(demo_bundle, tmp_path, row["prompt"], "--seed", row["seed"], *options, *FEW)
        assert files[number] == alone


def test_many_of_each_class(var_bundle: Path, tmp_path: Path) -> None:
    """As for a distance of VAR's pictures: classes by number and name, some of each, no seed twice."""
    file = written(tmp_path / "classes.csv", [{"label": "2"}, {"label": "Cup"}, {"label": "none"}])
    drawn(file, "--engine", var_bundle, "--output", tmp_path / "out", "--count", 3, "--preset", "fid")
    files = check_whole(tmp_path / "out", 9)
    rows = table(tmp_path / "out")
    assert [row["prompt"] for row in rows[::3]] == ["golden retriever (2)", "Cup (5)", "none"]
    assert [row["seed"] for row in rows] == list(range(9))
    assert files[4] == hart_run(var_bundle, tmp_path, "5", "--seed", 4, "--preset", "fid")


def test_bad_prompts_are_errors_in_the_table(demo_bundle: Path, var_bundle: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": p} for p in ("a star", " ", None, 7, "\ud800 half", "a ring")]
    file = written(tmp_path / "prompts.jsonl", rows)
    done = drawn(file, "--engine", demo_bundle, "--output", tmp_path / "out", *FEW)
    assert "4 of 6 pictures have an error in the table" in done.stderr
    errors = [row["error"] for row in table(tmp_path / "out")]
    assert errors[0] is errors[5] is None
    assert [str(error) for error in errors[1:5]] == [
        "the prompt is empty",
        "the prompt is empty",
        "expected text, found 7",
        "the prompt is not valid UTF-8",
    ]
    assert len(pictures(tmp_path / "out")) == 2
    labels = written(tmp_path / "labels.jsonl", [{"label": "crane"}, {"label": 99}, {"label": 3}])
    drawn(labels, "--engine", var_bundle, "--output", tmp_path / "classes")
    errors = [row["error"] for row in table(tmp_path / "classes")]
    assert "2 classes have this name; give 0" in errors[0]
    assert "expected 0 to 6" in errors[1]
    assert errors[2] is None


ROW = '{"prompt": "a star"}\n'
BAD = [
    ("prompts.md", "a star", "expected a file that ends in .txt or .jsonl or .csv or .parquet"),
    ("prompts.txt", " \n\n", "prompts.txt: holds no prompt"),
    ("prompts.txt", b"\xff\xfe\x00", "is UTF-16 text, expected UTF-8"),
    ("prompts.jsonl", ROW + "[1]", "row 1: expected a JSON object, found a list"),
    ("prompts.jsonl", ROW + '{"prompt": "x", "sed": 1}', "row 1: unknown sed; there are prompt, label, seed"),
    ("prompts.jsonl", ROW + '{"seed": 1}', "row 1: expected prompt or label, found seed"),
    ("prompts.jsonl", ROW + '{"prompt": "a", "label": "b"}', "row 1: expected prompt or label"),
    ("prompts.jsonl", ROW + '{"prompt": "x", "top_k": 0}', "row 1: top_k: expected 1 to 512, found 0"),
    ("prompts.jsonl", ROW + '{"prompt": "x", "top_k": [1]}', "row 1: top_k: expected a whole number"),
    ("prompts.jsonl", ROW + '{"prompt": "x", "seed": -1}', "row 1: seed: expected 0 to 92"),
    ("prompts.jsonl", ROW + '{"prompt": "x", "seed": true}', "row 1: seed: expected 0 to"),
    ("prompts.jsonl", ROW + '{"prompt": "x", "count": 0}', "row 1: count: expected 1 to 10000, found 0"),
    ("prompts.jsonl", ROW + '{"prompt": "x", "preset": "fid"}', "this model has none"),
    ("prompts.jsonl", '{"label": "a star"}', "draws texts and has no classes; expected prompt"),
    ("prompts.csv", "prompt,prompt\na,b", "prompts.csv: prompt stands there twice"),
    ("prompts.csv", "text\na", "prompts.csv: unknown text; there are prompt"),
    ("prompts.csv", "prompt,seed\na star,1\nb", "row 1: expected 2 values, as in its first line"),
    ("prompts.csv", 'prompt\n"a star" x', "not readable as CSV"),
    ("prompts.csv", "prompt,seed\na star,1.5", "row 0: seed: expected 0 to"),
    ("prompts.csv", "prompt,top_p\na star,much", "row 0: top_p: expected a number, found 'much'"),
    ("prompts.csv", "", "prompts.csv: expected prompt or label, found no column"),
    ("prompts.parquet", "no parquet", "prompts.parquet: not a readable Parquet file"),
]


@pytest.mark.parametrize(("name", "content", "words"), BAD)
def test_bad_files_are_refused(
    demo_bundle: Path, tmp_path: Path, name: str, content: str | bytes, words: str
) -> None:
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    manifest, _ = read_manifest(demo_bundle)
    with pytest.raises(InputError, match=re.escape(words)):
        make_plan(read_rows(file), file, manifest)


def test_what_refuses_a_file_writes_nothing(demo_bundle: Path, tmp_path: Path) -> None:
    file = written(tmp_path / "prompts.jsonl", [{"prompt": "a star"}, {"prompt": "a ring", "top_k": 0}])
    check_refused(tmp_path, "row 1: top_k: expected 1 to 512, found 0", file, "--engine", demo_bundle)


def check_refused(folder: Path, words: str, *arguments: object) -> None:
    """Exit code 2, a sentence, nothing written."""
    before = sorted(folder.rglob("*"))
    done = batch(*arguments, "--output", folder / "out")
    assert done.exit_code == 2, done.output
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" not in done.output
    assert sorted(folder.rglob("*")) == before


def test_bad_options_are_refused(demo_bundle: Path, var_bundle: Path, tmp_path: Path) -> None:
    file = written(tmp_path / "prompts.txt", [{"prompt": "2"}])
    engine = ("--engine", demo_bundle)
    for words, arguments in {
        "no such file": [tmp_path / "none.txt", *engine],
        "no bundle here": [file, "--engine", tmp_path],
        "--batch: expected 1 to 8": [file, *engine, "--batch", 9],
        "--actors: is for --ray, which is not given": [file, *engine, "--actors", "2"],
        "--cpus: is for --ray": [file, *engine, "--cpus", "2"],
        "--push: is for --ray": [file, *engine, "--push"],
        "--encoders: is for --ray": [file, *engine, "--encoders", 1],
        "--count: expected 1 to 10000, found 0": [file, *engine, "--count", 0],
        "--seed: expected 0": [file, *engine, "--seed", -1],
        "--safety-model: reads texts": [file, "--engine", var_bundle, "--safety-model", "x"],
        "--residual: this model has no residual": [file, "--engine", var_bundle, "--residual"],
    }.items():
        check_refused(tmp_path, words, *arguments)
    for actors in ("0", "3..2", "many", "1..", "1000000"):
        done = batch(file, *engine, "--output", tmp_path / "out", "--actors", actors)
        assert (done.exit_code, "expected a number such as 4" in done.stderr) == (2, True)
    inside = batch(file, *engine, "--output", demo_bundle / "out", *FEW)
    assert (inside.exit_code, "lies in the bundle" in inside.stderr) == (2, True)


def test_folders_of_others_are_refused(demo_bundle: Path, tmp_path: Path) -> None:
    file = written(tmp_path / "prompts.txt", [{"prompt": "a star"}])
    words = (file, "--engine", demo_bundle)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").write_text("mine")
    check_refused(tmp_path, "holds notes and no run of hart-batch; give another --output", *words)
    (tmp_path / "out" / "notes").unlink()
    drawn(*words, "--output", tmp_path / "out", *FEW)  # an empty folder will do
    check_refused(tmp_path, "belongs to another run, whose prompts is", *words)
    check_refused(tmp_path, "whose shards is False, here it is True", *words, *FEW, "--shards")
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    manifest, _ = read_manifest(demo_bundle)
    plan = make_plan([{"prompt": "a star"}], tmp_path, manifest)
    with open_output(tmp_path / "out", plan, Run(**{k: v for k, v in run.items() if k != "schema"})):
        check_refused(tmp_path, "another hart-batch writes there", *words, *FEW)
    check_whole(tmp_path / "out", 1)


@pytest.mark.parametrize("shards", [[], ["--shards"]])
def test_killed_and_started_again(demo_bundle: Path, tmp_path: Path, shards: list[str]) -> None:
    """At two moments; what was finished before is not drawn again."""
    file = written(tmp_path / "prompts.txt", [{"prompt": prompt} for prompt in PROMPTS * 8])
    words = (file, "--engine", demo_bundle, "--batch", 2, "--threads", 1, "--steps", 4, *shards)
    out = tmp_path / "out"
    for wanted in (1, 9):
        process = started(*words, "--output", out)
        while not (out / "journal.jsonl").exists() or len(journal_so_far(out)) < wanted:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    before = len(journal(out))
    drawn(*words, "--output", out)
    files = check_whole(out, 24)
    numbers = [line["number"] for line in journal(out)]
    assert sorted(numbers) == list(range(24))
    assert before < 24
    drawn(*words, "--output", out)  # nothing is left to do
    assert [line["number"] for line in journal(out)] == numbers
    drawn(*words, "--output", tmp_path / "once")
    assert check_whole(tmp_path / "once", 24) == files


def journal_so_far(folder: Path) -> list[str]:
    return (folder / "journal.jsonl").read_text().splitlines()


def test_stopped_by_hand(demo_bundle: Path, tmp_path: Path) -> None:
    """The table is that of what there is, and the same command goes on."""
    file = written(tmp_path / "prompts.txt", [{"prompt": prompt} for prompt in PROMPTS * 8])
    words = (file, "--engine", demo_bundle, "--batch", 1, "--output", tmp_path / "out")
    process = started(*words)
    while not (tmp_path / "out" / "journal.jsonl").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate()
    assert process.returncode == 143, said
    assert " of 24 pictures are done and kept; the same command goes on" in said
    rows = table(tmp_path / "out")
    assert [row["number"] for row in rows] == [line["number"] for line in journal(tmp_path / "out")]
    drawn(*words)
    check_whole(tmp_path / "out", 24)


@pytest.mark.parametrize("shards", [False, True])
def test_cut_off_anywhere(demo_bundle: Path, tmp_path: Path, shards: bool) -> None:
    """A journal and a shard that end at any byte: what their ends are lost of is done again, and no more."""
    manifest, _ = read_manifest(demo_bundle)
    rows = [{"prompt": f"picture {number}"} for number in range(4)]
    plan, run = make_plan(rows, tmp_path, manifest), Run("p", "b", "cpu", "auto", shards, "1")
    whole = tmp_path / "whole"
    with open_output(whole, plan, run) as output:
        for number in range(3):
            output.add(Finished(number, 1.0, "hash", png=bytes([number]) * 700))
    cut = "shards/.000000.tar.partial" if shards else "journal.jsonl"
    size, lines = (whole / cut).stat().st_size, (whole / "journal.jsonl").read_bytes()
    for end in sorted({*range(0, size, 97 if shards else 11), size - 1, size}):
        folder = Path(shutil.copytree(whole, tmp_path / f"{end}"))
        with (folder / cut).open("r+b") as stream:
            stream.truncate(end)
        with open_output(folder, plan, run) as output:
            left = [picture.number for picture in output.left]
            if end == size:
                assert left == [3]
            elif shards:
                assert left == [0, 1, 2, 3]  # what is shorter than its journal says is nobody's to trust
            else:
                assert left == list(range(lines[:end].count(b"\n"), 4))
            for number in left:
                output.add(Finished(number, 1.0, "hash", png=bytes([number]) * 700))
            output.end()
        files = {name: data for name, data in pictures(folder).items() if name.endswith(".png")}
        assert sorted(files.values()) == [bytes([number]) * 700 for number in range(4)]
        assert sorted(row["number"] for row in table(folder)) == [0, 1, 2, 3]
        assert {row["file"] for row in table(folder)} <= files.keys()


@pytest.mark.parametrize("shards", [False, True])
def test_folders_and_shards_are_bounded(demo_bundle: Path, tmp_path: Path, shards: bool) -> None:
    manifest, _ = read_manifest(demo_bundle)
    count = 2 * PER_FOLDER + 5
    plan = make_plan(({"prompt": "x"} for _ in range(count)), tmp_path, manifest)
    run = Run("p", "b", "cpu", "auto", shards, "1")
    for first, last in ((0, PER_FOLDER), (PER_FOLDER, count - 1), (count - 1, count)):  # in three runs
        with open_output(tmp_path / "out", plan, run) as output:
            for number in range(first, last):
                output.add(Finished(number, 0.0, "hash", png=str(number).encode()))
            output.end()
    files = {name: data for name, data in pictures(tmp_path / "out").items() if name.endswith(".png")}
    assert {files[row["file"]] for row in table(tmp_path / "out")} == {str(n).encode() for n in range(count)}
    homes = [name.rpartition("/")[0] for name in files]
    assert sorted(map(homes.count, set(homes))) == [5, PER_FOLDER, PER_FOLDER]


def test_pictures_that_are_gone_are_drawn_again(demo_bundle: Path, tmp_path: Path) -> None:
    file = written(tmp_path / "prompts.txt", [{"prompt": prompt} for prompt in PROMPTS])
    words = (file, "--engine", demo_bundle, "--output", tmp_path / "out", *FEW)
    drawn(*words)
    files = check_whole(tmp_path / "out", 3)
    (tmp_path / "out" / table(tmp_path / "out")[1]["file"]).unlink()
    assert "1 pictures are gone, and drawn again" in drawn(*words).stderr
    assert check_whole(tmp_path / "out", 3) == files


def test_a_machine_that_draws_nothing_ends_the_run(demo_bundle: Path, tmp_path: Path) -> None:
    """And does not fill the table with errors that are not the prompts'."""
    bundle = poisoned(demo_bundle, tmp_path, float("nan"))
    file = written(tmp_path / "prompts.txt", [{"prompt": prompt} for prompt in PROMPTS * 4])
    done = batch(file, "--engine", bundle, "--output", tmp_path / "out", *FEW)
    assert done.exit_code == 1
    assert "3 pictures in a row failed, the last of them: " in done.stderr
    assert len(journal(tmp_path / "out")) < 3


def test_the_rate_is_that_of_drawing() -> None:
    rate = Rate()
    rate.add(8, 100.0)  # came when everything was opened
    assert rate() == 0
    for now in (102.0, 104.0):
        rate.add(8, now)
    assert rate() == 4
    assert sentence(24, 1024, rate()) == "24 of 1024, 4.00 a second, 0:04:10 left"


def test_a_plan_of_many_settings(demo_bundle: Path, tmp_path: Path) -> None:
    """Pictures of equal settings are drawn together, wherever their rows stand."""
    manifest, _ = read_manifest(demo_bundle)
    rows = [{"prompt": "x", "guidance": 1 + number % 3} for number in range(9)]
    plan = make_plan(rows, tmp_path, manifest)
    with open_output(tmp_path / "out", plan, RUN) as output:
        assert [picture.number for picture in output.left] == [0, 3, 6, 1, 4, 7, 2, 5, 8]
    with pytest.raises(InputError, match="row 0: guidance: expected 0 to 1000, found nan"):
        make_plan([{"prompt": "x", "guidance": float("nan")}], tmp_path, manifest)


def test_what_an_actor_needs_is_what_a_dry_run_tells(demo_bundle: Path) -> None:
    manifest, _ = read_manifest(demo_bundle)
    found = needed(manifest, 8)
    needs = needs_of(manifest, 8, "cpu", None)
    assert (needs.cpus, needs.gpus) == (SHARE, 0)
    assert (
        needs.memory == PROCESS + found.weights + found.text + found.arena + found.constants + found.scratch
    )
    assert needs.memory > needs_of(manifest, 1, "cpu", None).memory
    on_gpu = needs_of(manifest, 8, "cuda", 2.5)
    assert (on_gpu.cpus, on_gpu.gpus) == (2.5, 1)
    assert on_gpu.memory < needs.memory


def test_as_many_actors_as_fit() -> None:
    needs, gib = Needs(0.8, 0, 1 << 30), 1 << 30
    nodes = [{"CPU": 2.0, "memory": 8.0 * gib}, {"CPU": 16.0, "memory": 3.5 * gib}, {"memory": 8.0 * gib}]
    assert [needs.fit(node) for node in nodes] == [2, 3, 0]
    assert actors_for(None, needs, nodes) == (5, 5)
    assert actors_for((1, 64), needs, nodes) == (1, 64)  # what a cluster that grows may have later
    with pytest.raises(
        InputError, match=r"`actors`: 6 need 0\.8 CPU and 1\.07 GB of memory each, and there is room"
    ):
        actors_for((6, 6), needs, nodes)
    with pytest.raises(InputError, match="there is room for 0"):
        actors_for(None, Needs(1, 1, gib), nodes)
    assert Needs(1, 1, gib).fit({"CPU": 8, "GPU": 4, "memory": 64 * gib}) == 4


def test_what_an_encoder_takes_off_the_others(demo_bundle: Path) -> None:
    manifest, _ = read_manifest(demo_bundle)
    whole = needs_of(manifest, 8, "cpu", None)
    encoder = needs_of(manifest, 8, "cpu", None, drawing=False)
    rest = needs_of(manifest, 8, "cpu", None, text=False)
    assert whole.memory - rest.memory == needed(manifest, 8).text > 0
    assert encoder.memory < whole.memory
    nodes = [{"CPU": 1.0, "memory": 1e12}, {"CPU": 2.0, "memory": 1e12}]
    left = without(nodes, encoder, 2)
    assert [round(node["CPU"], 6) for node in left] == [0.2, 1.2]
    assert actors_for(None, rest, left) == (1, 1)
    assert nodes[0]["CPU"] == 1
    with pytest.raises(InputError, match="`encoders`: 4 need"):
        actors_for((4, 4), encoder, nodes, "encoders")


def test_where_actors_draw(demo_bundle: Path) -> None:
    manifest, _ = read_manifest(demo_bundle)
    gpus = [{"CPU": 8.0}, {"CPU": 8.0, "GPU": 1.0}]
    assert device_for("auto", manifest, gpus) == "cuda"
    assert device_for("auto", manifest, gpus[:1]) == "cpu"
    assert device_for("cpu", manifest, gpus) == "cpu"
    int8 = replace(manifest, precision="int8")
    assert device_for("auto", int8, gpus) == "cpu"


def test_nodes_that_draw_otherwise_are_refused() -> None:
    versions, place = {"hart-runtime": "1", "ray": "2.60.0", "Python": "3.11"}, Path("/engines/demo")
    check_nodes([Node("a (01)", versions, "x" * 64)] * 2, versions, place, "x" * 64)
    check_nodes([Node("a (01)", versions, None)], versions, place, None)
    for node, words in {
        Node("b (02)", {**versions, "ray": "2.59.0"}, "x"): "node b (02): has ray 2.59.0, here it is 2.60.0",
        Node("b (02)", {"ray": "2.60.0"}, "x"): "node b (02): has hart-runtime not at all, here it is 1",
        Node("b (02)", versions, None): "node b (02): /engines/demo: no bundle there; copy it to every node",
        Node(
            "b (02)", versions, "y" * 64
        ): "node b (02): /engines/demo: another bundle there (yyyyyyyyyyyy...)",
    }.items():
        with pytest.raises(InputError, match=re.escape(words)):
            check_nodes([Node("a (01)", versions, "x"), node], versions, place, "x")
