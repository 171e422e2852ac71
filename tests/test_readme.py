"""README.md is true: its lines of the core stand in the source, and its examples print what it says."""
import os
import re
import subprocess
import sys

from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.DOTALL)


def block(words):
    """The Python block with these words in it, and the block behind it, if there is one."""
    (i,) = [i for i, (language, code) in enumerate(BLOCKS) if language == "python" and words in code]
    return BLOCKS[i][1], "".join(code for _, code in BLOCKS[i + 1:i + 2])


def run(code, folder=ROOT):
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, encoding="utf-8",
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_idea_in_code_is_the_code():
    source = (ROOT / "prompt_encoder.py").read_text(encoding="utf-8").splitlines()
    section = README[README.index("## The idea in code"):README.index("## Reading order")]
    lines = [line for code in re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL) for line in code.splitlines()]
    assert len(lines) > 5 and [line for line in lines if line not in source] == []


def test_the_worked_example_and_the_trace_print_what_stands_below_them():
    for words in "pairs = make_pairs(", "traced":
        code, printed = block(words)
        assert run(code) == printed


def test_the_controller_beside_transformers():
    code = (ROOT / "tests/with_transformers.py").read_text(encoding="utf-8")
    assert run(code, ROOT / "tests") == "tensor([[  32, 1126,   13, 4095]])\n"


def test_dialogues_in_a_list(tmp_path):
    out = run(block("from train import train")[0].replace("epochs=20", "epochs=1"), tmp_path)
    assert "tested: epoch 1 of 1" in out and (tmp_path / "runs/mine/results.json").exists()


def test_the_converters(tmp_path):
    """Three formats, the same dialogues; a turn may hold a line break."""
    (tmp_path / "chats.csv").write_text('dialogue,text\n1,"Hi,\nyou."\n1,Hello.\n2,Bye.\n2,See you.\n')
    (tmp_path / "chats.jsonl").write_text('{"turns": ["Hi,\\nyou.", "Hello."]}\n{"turns": ["Bye.", "See you."]}\n')
    (tmp_path / "chats.txt").write_text("Anna: Hi,\nyou.\nBen: Hello.\n\nAnna: Bye.\nBen: See you.\n")
    code, _ = block("csv.DictReader")
    code = re.sub(r"^(dialogues = .*)", r"\1\nprint(dialogues)", code, flags=re.MULTILINE)
    assert run(code, tmp_path).splitlines() == [str([["Hi,\nyou.", "Hello."], ["Bye.", "See you."]])] * 3


def test_line_counts():
    rows = re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, flags=re.MULTILINE)
    assert len(rows) == 5
    for name, lines in rows:
        assert abs(int(lines) - len((ROOT / name).read_text(encoding="utf-8").splitlines())) <= 20, name
