"""The command line: what it prints, its exit codes, one line per error."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from transfuse import catalogue, cli, compare, recipe, schema
from transfuse.core.errors import BadInput, TrainingDiverged, Unavailable
from transfuse.core.references import REFERENCES

EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "run"


@pytest.fixture
def call(capsys):
    """Run the command line in this process: (exit code, stdout, stderr)."""

    def _call(*words: str) -> tuple[int, str, str]:
        code = cli.main(words)
        out, err = capsys.readouterr()
        return code, out, err

    return _call


def test_methods_lists_every_method_on_a_line(call):
    code, out, err = call("methods")
    assert (code, err) == (0, "")
    header, *lines = out.splitlines()
    assert header.split()[:3] == ["slug", "family", "arXiv"]
    assert [line.split()[0] for line in lines] == [m.slug for m in catalogue.methods()]


def test_methods_of_one_family_as_json(call):
    code, out, _ = call("methods", "--family", "steer", "--json")
    assert code == 0
    listed = json.loads(out)
    assert listed == [m.describe() for m in catalogue.methods("steer")]
    keys = {"slug", "title", "family", "arxiv", "moves", "access", "evidence"}
    assert all(keys <= row.keys() for row in listed)


@pytest.mark.parametrize("spelling", ["ck-plug", "ck_plug"])
def test_show(call, spelling):
    code, out, _ = call("show", spelling)
    assert code == 0
    method = catalogue.find("ck-plug")
    for part in (
        method.title,
        method.moves,
        "access:",
        "evidence:",
        "from transfuse.steer.ck_plug import CKPlug",
    ):
        assert part in out


@pytest.mark.parametrize("method", catalogue.methods(), ids=lambda method: method.slug)
def test_show_yaml_is_a_recipe(call, method):
    """With the required files and models filled in, what `show --yaml` prints passes the recipe's own check."""
    code, out, _ = call("show", method.slug, "--yaml")
    assert code == 0
    assert out.startswith(f"# {method.title}")
    shown = yaml.safe_load(out)
    if "method" not in shown:  # the family has no single run
        assert shown["uses"] == method.slug
        return
    for name, value in shown.items():
        if value is None and (EXAMPLES / f"{name}.jsonl").is_file():
            shown[name] = str(EXAMPLES / f"{name}.jsonl")
    if "texts" in getattr(catalogue.get(method.slug), "reads", ()):
        shown["texts"] = str(EXAMPLES / "documents.jsonl")
    for name, value in (shown["method"].get("with") or {}).items():
        if value is None and f"    {name}:  # required" in out:
            shown["method"]["with"][name] = ["smollm2-135m"] if name == "experts" else "smollm2-135m"
    checked = recipe.check(shown)
    assert (checked.slug, checked.family) == (method.slug, method.family)


def test_models(call, monkeypatch, tmp_path):
    monkeypatch.setenv("TRANSFUSE_CACHE", str(tmp_path))
    code, out, _ = call("models", "--json")
    assert code == 0
    listed = json.loads(out)
    assert [row["name"] for row in listed] == list(REFERENCES)
    assert all(row["licence"] and row["origin"] and row["download_bytes"] > 1e6 for row in listed)
    assert all(row["cached"] is None for row in listed)
    code, out, _ = call("models")
    assert code == 0
    assert out.count("not yet") == len(REFERENCES)


def test_datasets(call):
    code, out, _ = call("datasets")
    assert code == 0
    assert "counterfact" in out
    code, out, _ = call("datasets", "--json")
    assert code == 0
    assert json.loads(out)


def test_schema_is_a_json_schema(call):
    code, out, _ = call("schema")
    assert code == 0
    assert json.loads(out) == json.loads(json.dumps(schema.recipe_schema()))


def test_version_and_help(call):
    from transfuse import __version__

    assert call("--version")[:2] == (0, __version__ + "\n")
    code, out, _ = call("--help")
    assert code == 0
    for command in ("methods", "show", "models", "datasets", "evidence", "run", "compare", "schema"):
        assert f"  {command} " in out
    assert call()[0] == 2


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["show", "ck-plgu"], "did you mean 'ck-plug'"),
        (["show"], "SLUG"),
        (["methods", "--family", "seer"], "did you mean 'steer'"),
        (["methods", "--jsno"], "--json"),
        (["frobnicate"], "frobnicate"),
        (["evidence", "no-such-method"], "no-such-method"),
        (["evidence", "ck-plug", "--seeds", "0"], "--seeds"),
        (["evidence", "ck-plug", "--seeds", "two"], "--seeds"),
        (["run", "missing.yaml"], "missing.yaml"),
        (["compare", "missing.yaml"], "missing.yaml"),
        (["compare"], "RECIPE"),
        (["schema", "surplus"], "surplus"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(call, monkeypatch, tmp_path, words, says):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(*words)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert says in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        BadInput("rank", 0, "is not positive", "give at least 1"),
        Unavailable("the hub\ncannot be reached"),
        TrainingDiverged("the loss became NaN in step 3; lower lr"),
    ],
)
def test_errors_of_the_library_are_one_line(call, monkeypatch, error):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(compare, "compare", fails)
    code, _, err = call("compare", "x.yaml")
    assert code == 2
    assert err == "error: " + " ".join(str(error).split()) + "\n"
    monkeypatch.setenv("TRANSFUSE_DEBUG", "1")
    with pytest.raises(type(error)):
        call("compare", "x.yaml")


def test_a_fault_of_the_program_is_not_hidden(call, monkeypatch):
    def fails(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr(compare, "compare", fails)
    with pytest.raises(ZeroDivisionError):
        call("compare", "x.yaml")


def test_warnings_are_one_line(call, monkeypatch):
    import warnings

    monkeypatch.setattr(compare, "compare", lambda *_, **__: warnings.warn("old\nfile", stacklevel=1))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        before = warnings.showwarning
        assert call("compare", "x.yaml") == (0, "", "warning: old file\n")
        assert warnings.showwarning is before  # lent for a command


def test_compare_and_run_pass_their_arguments_on(call, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(compare, "compare", lambda *a, **k: seen.append((a, k)))
    monkeypatch.setattr(recipe, "run", lambda *a, **k: seen.append((a, k)) or tmp_path)
    assert call("compare", "a.yaml", "--output", str(tmp_path))[0] == 0
    assert call("run", "b.yaml")[0] == 0
    assert seen == [((Path("a.yaml"),), {"output": tmp_path}), ((Path("b.yaml"),), {"output": None})]


@pytest.mark.parametrize(
    ("module", "name", "words", "told"),
    [
        ("transfuse.compare", "compare", ["compare", "x.yaml"], "goes on from there"),
        ("transfuse.core.evidence", "run_evidence", ["evidence", "kasa"], "starts over"),
    ],
)
def test_interruption_is_exit_code_130(module, name, words, told):
    """Ctrl-C while a command works: one line, no traceback, and what the same command will do."""
    code = (
        f"import sys, time, {module} as c, transfuse.cli as cli\n"
        "def slow(*a, **k):\n    print('working', flush=True)\n    time.sleep(60)\n"
        f"c.{name} = slow\nsys.exit(cli.main({words}))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "working\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.startswith("interrupted: ") and err.endswith(told + "\n")
    assert err.count("\n") == 1


def test_sigterm_leaves_nothing_unfinished(tmp_path):
    """Batch systems and containers end a process so: what a merge wrote so far is removed."""
    import torch
    from safetensors.torch import save_file

    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        save_file({f"w{i}": torch.zeros(1_000_000) for i in range(60)}, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "merge.yml").write_text("models: [one, two]\nmethod: slerp\nchecksums: false\n")
    code = "import sys, transfuse.cli as cli\nsys.exit(cli.main(['merge', 'merge.yml', '-o', 'merged']))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    while not list(tmp_path.glob(".merged.*.tmp/model.safetensors")):
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert err == "interrupted: nothing was written; the same command starts over\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merge.yml", "one", "two"]


def test_sigterm_is_whose_it_was(call):
    """Its handler is lent for a command, not in other threads, and not where somebody else has one."""
    seen = []
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        assert call("--version")[0] == 0 and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        thread = threading.Thread(target=lambda: seen.append(cli.main(["--version"])))
        thread.start()
        thread.join()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        assert call("--version")[0] == 0 and signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [0]


@pytest.mark.parametrize("words", ["methods", "methods --json"])  # less than a buffer, and more
def test_a_closed_pipe_is_quiet(words):
    code = "import sys, transfuse.cli as cli; sys.exit(cli.main())"
    command = f"{sys.executable} -c '{code}' {words} | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env={**os.environ})
    assert (done.returncode, done.stdout, done.stderr) == (141, "", "")


def test_as_a_module():
    words = [sys.executable, "-m", "transfuse", "show", "ck-plgu"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stdout == ""


def test_lines_are_cut_on_a_narrow_terminal(call, monkeypatch):
    monkeypatch.setattr(sys.stdout.__class__, "isatty", lambda self: True, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    code, out, _ = call("methods")
    assert code == 0
    assert max(map(len, out.splitlines())) == 60
