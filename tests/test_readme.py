"""README.md is true: its lines of the core stand in the source, and its examples print what it says."""
import re
import subprocess
import sys

from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.DOTALL)


def python_blocks(words):
    return [code for language, code in BLOCKS if language == "python" and words in code]


def run(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_idea_in_code_is_the_code():
    source = (ROOT / "prompt_encoder.py").read_text(encoding="utf-8").splitlines()
    section = README[README.index("## The idea in code"):README.index("## One example")]
    lines = [line for block in re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL) for line in block.splitlines()]
    assert len(lines) > 10 and [line for line in lines if line not in source] == []


def test_the_worked_example_prints_what_the_readme_says():
    (index,) = [i for i, (language, code) in enumerate(BLOCKS) if language == "python" and "pairs = make_pairs(" in code]
    assert run(BLOCKS[index][1]) == BLOCKS[index + 1][1]


def test_a_training_loop_of_your_own():
    (code,) = python_blocks("model.trained().values()")
    assert run(code) == "[[32, 1126, 13]]\n"


def test_the_controller_beside_transformers():
    (code,) = python_blocks("inputs_embeds")
    assert run(code) == "tensor([[  32, 1126,   13, 4095]])\n"


def test_line_counts():
    rows = re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, flags=re.MULTILINE)
    assert len(rows) == 5
    for name, lines in rows:
        assert abs(int(lines) - len((ROOT / name).read_text(encoding="utf-8").splitlines())) <= 50, name
