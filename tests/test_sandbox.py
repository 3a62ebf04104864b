"""Chapter 2, programs: right ones earn 1 however they are written, hostile ones gain and harm nothing."""

# ruff: noqa: E501  (hostile programs are easier to read in a line of their own)
import contextlib
import itertools
import json
import os
import queue
import random
import socket
import stat
import subprocess
import sys
import tempfile
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import reward
import sft
from reward import program_rewards, run_programs

ENOUGH = 60.0  # seconds, for what ends by itself: however busy the machine is
SHORT = 0.5  # for what never ends
SECRET = (
    f"secret-{random.SystemRandom().getrandbits(64)}"  # no program can guess it, only get at it
)
PLACE = "/dev/shm/sandbox-test-escape"
bubblewrap = pytest.mark.skipif(
    not reward.sandbox(),
    reason="bubblewrap is missing (apt install bubblewrap), or may not make namespaces",
)
WAYS = [pytest.param("sandbox", marks=bubblewrap), "limits"]


def call(*tests, name="f"):
    """A call-based problem with (arguments, result) tests."""
    inputs, outputs = [list(given) for given, _ in tests], [result for _, result in tests]
    return {"input_output": {"fn_name": name, "inputs": inputs, "outputs": outputs}}


def stdio(*tests):
    """A problem on standard input and output with (input, output) tests."""
    return {
        "input_output": {
            "inputs": [given for given, _ in tests],
            "outputs": [said for _, said in tests],
        }
    }


SQUARE = call(([3], 9), ([5], 25), ([7], 49))
DOUBLE = stdio(("3", "6"), ("5\n", "10\n"), ("7", ["14"]))
RIGHT, RIGHT_SCRIPT = "def f(x): return x * x", "print(2 * int(input()))"


def one(program, problem, timeout=ENOUGH):
    return program_rewards([program], [problem], timeout)[0]


# What right, wrong and broken programs earn


def test_rewards_are_the_papers_formula_worked_by_hand():
    partly = "def f(x): return x * x if x < limit else 0\nlimit = "
    programs = [
        RIGHT,
        partly + "6",
        partly + "4",
        partly + "0",
        "def f(x): return 1 / 0",
        "def f(x) return x",
    ]
    wanted = [1.0, -0.3 + 1.3 * 2 / 3, -0.3 + 1.3 / 3, -0.3, -0.6, -1.0]
    assert program_rewards(programs, [SQUARE] * 6, ENOUGH) == pytest.approx(wanted, abs=1e-12)


def test_one_test_that_raises_or_is_late_makes_the_program_a_runtime_error():
    raises = "def f(x): return 1 // (7 - x) * 0 + x * x"
    assert run_programs([raises, RIGHT], [SQUARE] * 2, ENOUGH) == [
        ("runtime error", 2, 3),
        ("ran", 3, 3),
    ]
    assert run_programs(["while True: pass"], [DOUBLE], SHORT) == [("time-out", 0, 3)]
    assert [one(raises, SQUARE), one("while True: pass", DOUBLE, SHORT)] == [-0.6, -0.6]


@pytest.mark.slow
def test_the_timeout_is_of_a_test_not_of_a_program():
    slow = "import time\ndef f(x): time.sleep(2); return x * x"
    assert one(slow, SQUARE, timeout=5) == 1.0  # 6 s in all


def test_scripts_talk_through_standard_input_and_output():
    assert one(RIGHT_SCRIPT, DOUBLE) == 1.0
    lines = stdio((["2", "1 2", "3 4"], ["3", "7"]))
    for read in (
        "sys.stdin.readline()",
        "input()",
        "sys.stdin.buffer.readline()",
        "next(sys.stdin)",
        "stdin.readline()",
    ):
        program = (
            f"import sys\nfor _ in range(int({read})):\n    print(sum(map(int, {read}.split())))"
        )
        assert one(program, lines) == 1.0, read
    for file in ("0", "'/dev/stdin'"):
        program = f"n, *rest = open({file})\nfor line in rest: print(sum(map(int, line.split())))"
        assert one(program, lines) == 1.0, file
    assert one("print('é', input())", stdio(("ü", "é ü"))) == 1.0


OUTPUTS = {  # what is printed, for what, and whether that is right
    "white space around lines, and empty lines": ("  a b \r\n\n\t c\n\n", "a b\n\nc\n", True),
    "white space between words": ("a   b\tc", "a b c", True),
    "no newline at the end": ("a", "a\n", True),
    "nothing, where nothing is expected": ("\n \n", "", True),
    "0.1 + 0.2": ("0.30000000000000004", "0.3", True),
    "fewer digits": ("0.333333", "0.333333333", True),
    "three decimals": ("0.3334", "0.33341", True),
    "float for int": ("2.0", "2", True),
    "five digits": ("1234567.9", "1234568.0", True),
    "floats in a line": ("1.0000001 2.5\n3", "1 2.50\n3.0", True),
    "scientific": ("1e-3", "0.001", True),
    "any order of lines": ("b\na", "a\nb", True),  # as APPS' harness takes it
    "any order of words": ("b a", "a b", True),
    "4,400 digits": ("7" * 4400, "7" * 4400, True),
    "4,400 other digits": ("7" * 4399 + "8", "7" * 4400, False),
    "another whole number": ("100001", "100000", False),
    "another number": ("0.334", "0.333", False),
    "not a number": ("nan", "1", False),
    "infinity": ("inf", "1", False),
    "a word too few": ("a b", "a b b", False),
    "a line too few": ("YES\nNO", "YES\nNO\nYES", False),
    "words in other lines": ("a\nb", "a b", False),
    "upper case": ("yes", "YES", False),
    "nothing": ("", "a", False),
    "only signs": ("--5", "-5", False),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_printed_text_is_compared_as_apps_does(name):
    printed, expected, right = OUTPUTS[name]
    assert reward.same_output(printed, expected) == right


def test_what_scripts_print_is_compared_so():
    problem = stdio(("", "0.3\n2\n"), ("", ["0.3", "2"]))
    assert one("print(0.1 + 0.2)\nprint(2.0)", problem) == 1.0
    assert one("print(0.1 + 0.3)\nprint(2.0)", problem) == -0.3


PYRIVAL = """import os, sys
from io import BytesIO, IOBase

class FastIO(IOBase):
    def __init__(self, file):
        self._fd = file.fileno()
        self.buffer = BytesIO()
        self.writable = "x" in file.mode or "r" not in file.mode
        self.write = self.buffer.write if self.writable else None
    def readline(self):
        while b"\\n" not in self.buffer.getvalue()[self.buffer.tell():]:
            b = os.read(self._fd, 1 << 16)
            at = self.buffer.tell()
            self.buffer.seek(0, 2), self.buffer.write(b), self.buffer.seek(at)
            if not b: break
        return self.buffer.readline()
    def flush(self):
        if self.writable:
            os.write(self._fd, self.buffer.getvalue())
            self.buffer.truncate(0), self.buffer.seek(0)

class IOWrapper(IOBase):
    def __init__(self, file):
        self.buffer = FastIO(file)
        self.flush = self.buffer.flush
        self.writable = self.buffer.writable
        self.write = lambda s: self.buffer.write(s.encode("ascii"))
        self.readline = lambda: self.buffer.readline().decode("ascii")

sys.stdin, sys.stdout = IOWrapper(sys.stdin), IOWrapper(sys.stdout)
input = lambda: sys.stdin.readline().rstrip()
sys.stdout.write(input())
"""
ENDS = {
    "sys.exit": "import sys; print('end'); sys.exit()",
    "sys.exit(0)": "import sys; print('end'); sys.exit(0)",
    "exit": "print('end'); exit()",
    "quit(0)": "print('end'); quit(0)",
    "SystemExit": "print('end'); raise SystemExit",
    "os._exit": "import os, sys; print('end'); sys.stdout.flush(); os._exit(0)",
    "os.write": "import os; os.write(1, b'end')",
    "the buffer": "import sys; sys.stdout.buffer.write(b'end')",
    "writelines": "import sys; sys.stdout.writelines(c for c in 'end')",
    "print to stdout without an import": "stdout.write('end')",
    "a thread": "import threading, time\nthreading.Thread(target=lambda: (time.sleep(0.1), print('end'))).start()",
    "a big stack": "import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(1 << 28)\n"
    "t = threading.Thread(target=lambda: print('end'))\nt.start()\nt.join()",
    "ten threads": "import threading\nfor c in 'end.......':\n    t = threading.Thread(target=lambda: c == '.' or print(c, end=''))\n    t.start(); t.join()",
    "an executor": "from concurrent.futures import ThreadPoolExecutor\nThreadPoolExecutor(2).submit(print, 'end')",
    "atexit": "import atexit; atexit.register(print, 'end')",
    "atexit with a buffer": "import atexit, io, sys\nsys.stdout = io.StringIO()\n"
    "atexit.register(lambda: sys.__stdout__.write(sys.stdout.getvalue()))\nprint('end')",
    "a wrapper": "import io, sys\nsys.stdout = io.TextIOWrapper(sys.stdout.buffer, write_through=False)\nprint('end')",
    "a wrapper of the detached buffer": "import io, sys\nsys.stdout = io.TextIOWrapper(sys.stdout.detach(), 'utf-8')\nprint('end')",
    "a buffered writer": "import io\nout = io.BufferedWriter(io.FileIO(1, 'w', closefd=False))\nout.write(b'end')",
    "a file": "file = open(1, 'w', closefd=False)\nfile.write('end')",
    "a file that closes it": "file = open(1, 'w')\nfile.write('end')",
    "a file in a function that exits": "def main():\n    file = open(1, 'w')\n    file.write('end')\n    exit()\nmain()",
    "a copy of the descriptor": "import os\nfile = os.fdopen(os.dup(1), 'w')\nfile.write('end')",
    "/dev/stdout": "open('/dev/stdout', 'w').write('end')",
    "closes it, and goes on": "import os, time\nos.write(1, b'end'); os.close(1); time.sleep(0.1); x = [1] * 10**6",
    "sys.stdout.close": "import sys\nprint('end'); sys.stdout.close()",
    "a file in a cycle": "class A: pass\na = A(); a.a = a; a.file = open(1, 'w', closefd=False); a.file.write('end')",
    "__del__": "import os\nclass Out:\n    def __del__(self): os.write(1, b'end')\nout = Out()",
    "a patched print": "import functools, io, sys\nprint = functools.partial(print, file=open(1, 'w', closefd=False))\nprint('end')",
    "redirect_stdout": "import contextlib, io\nwith contextlib.redirect_stdout(io.StringIO()) as out: print('end')\nprint(out.getvalue())",
    "a child": "import os\nif os.fork() == 0:\n    print('end')\nelse:\n    os.wait()",
    "a child that stays": "import os, time\nprint('end', flush=True)\nif os.fork() == 0: time.sleep(1000)",
    "main": "def main():\n    print('end')\nif __name__ == '__main__': main()",
    "a dataclass": "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: int = 0\nprint('end')",
    "pickle": "import pickle\nclass A: x = 'end'\nprint(pickle.loads(pickle.dumps(A())).x)",
    "a fast I/O class": PYRIVAL,
}


@pytest.mark.parametrize("way", WAYS)
def test_a_script_may_end_in_any_way_that_python_knows(way, ways):
    ways(way)
    programs = list(ENDS.values())
    results = run_programs(programs, [stdio(("end\n", "end"))] * len(programs), ENOUGH)
    assert dict(zip(ENDS, results, strict=True)) == dict.fromkeys(ENDS, ("ran", 1, 1))


def test_a_script_that_prints_the_answer_and_fails_has_not_finished():
    for program in (
        "print('end'); exit(1)",
        "print('end'); raise SystemExit('no')",
        "print('end'); 1 / 0",
    ):
        assert one(program, stdio(("", "end"))) == -0.6, program


def test_functions_and_solution_classes_are_called():
    method = (
        "class Solution:\n    def f(self, xs: List[int]) -> Optional[int]:\n        return max(xs)"
    )
    assert one(method, call(([[1, 3, 2]], 3))) == 1.0
    both = "def f(xs): return max(xs)\nclass Solution:\n    def f(self, xs): return -f([-x for x in xs])"
    assert one(both, call(([[1, 3, 2]], 1))) == 1.0  # the class's
    assert one("f = lambda *a, b=1: [*a, b]\nprint('noise')", call(([5, 6], [5, 6, 1]))) == 1.0
    assert (
        one("if __name__ == '__main__': 1 / 0\ndef f(): return deque([1]).pop()", call(([], 1)))
        == 1.0
    )
    assert one("def g(x): return x * x", SQUARE) == -0.6
    lazy = "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\n"
    assert one(lazy + "def f(x): return A(x).x ** 2", SQUARE) == 1.0


def test_results_are_compared_as_plain_data():
    assert (
        one("def f(): return (1, (2, 'ä')), {3: None}", call(([], [[1, [2, "ä"]], {"3": None}])))
        == 1.0
    )
    assert one("def f(): return 2", call(([], [2]))) == 1.0  # APPS wraps some results
    assert one("def f(): return 2.0", call(([], 2))) == 1.0
    assert one("def f(): return fractions.Fraction(1, 2)", call(([], 0.5))) == 1.0
    assert one("def f(): return [2]", call(([], [2]))) == 1.0
    assert one("def f(): return 1", call(([], [1, 2]))) == -0.3
    assert one("def f(): return '2'", call(([], 2))) == -0.3
    assert (
        one("def f(): return 0.1 + 0.2", call(([], 0.3))) == -0.3
    )  # as APPS has it: only text is rounded


def test_keys_that_json_made_text_are_ints_again():
    assert one("def f(d): return d[1]", call(([{"1": 5}], 5))) == 1.0
    assert one("def f(d, n): return d[n]", call(([{"1": 5}, 1], 5))) == 1.0
    assert (
        one("def f(d): return sorted(d)", call(([{"10": 0, "9": 0, "-1": 0}], [-1, 9, 10]))) == 1.0
    )
    assert (
        one("def f(d): return d['a'], d['1']", call(([{"a": 1, "1": 2}], [1, 2]))) == 1.0
    )  # not all are
    assert one("def f(n): return {n: [n]}", call(([1], {"1": [1]}))) == 1.0
    assert one("def f(n): return {n: [n]}", call(([1], [{"1": [1]}]))) == 1.0
    assert one("def f(n): return Counter([n, n])", call(([1], {"1": 2}))) == 1.0
    assert one("def f(n): return {n: [n]}", call(([1], {"2": [1]}))) == -0.3


def test_integers_of_thousands_of_digits_are_numbers():
    big = 10**4400 + 7
    assert one("def f(x): return x + 1", call(([big], big + 1))) == 1.0
    assert one("def f(x): return x + 2", call(([big], big + 1))) == -0.3
    assert one("def f(x): return str(x)", call(([big], big))) == -0.3
    assert one("print(int(input()) + 1)", stdio((str(big), str(big + 1)))) == 1.0
    text = json.dumps(call(([big], big + 1))["input_output"])
    assert one("def f(x): return x + 1", {"input_output": text}) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "```python\n{}\n```",
        "```\n{}\n```",
        "```py\r\n{}\r\n```\r\n",
        "Sure! Here is the program:\n\n```python\n{}\n```\nIt doubles `x`. Try\n```\nnonsense(\n```\n",
        "1. Write\n   ```python\n   {}\n   ```",
        "```python\n{}",  # cut off at the longest response
        "````Python\n{}\n````",
    ],
)
def test_the_first_block_of_markdown_is_run(text):
    assert one(text.format(RIGHT_SCRIPT), DOUBLE) == 1.0
    assert one(text.format("print(0)"), DOUBLE) == -0.3
    assert one(text.format("print(0"), DOUBLE) == -1.0


def test_a_fence_inside_a_program_is_the_programs_own():
    assert one('"""\n```\nprint(1)\n```\n"""\n' + RIGHT_SCRIPT, DOUBLE) == 1.0


MALFORMED = {
    "2 inputs and 1 outputs": {"inputs": ["1", "2"], "outputs": ["1"]},
    "0 inputs and 1 outputs": {"inputs": [], "outputs": ["1"]},
    "0 inputs and 0 outputs": {"inputs": [], "outputs": []},
    r"unit test 1 must be text or lines of text, got \[1\]": {"inputs": ["1"], "outputs": [[1]]},
    "unit test 2 must be text or lines of text, got 2": {"inputs": ["1", "2"], "outputs": ["1", 2]},
    "unit test 1 must be text or lines of text, got None": {"inputs": [None], "outputs": ["1"]},
    "unit test 1 must have a list of arguments, got 'ab'": {
        "fn_name": "f",
        "inputs": ["ab"],
        "outputs": [1],
    },
    "'inputs' must be a list": {"inputs": "1", "outputs": "1"},
    "'outputs' is missing": {"inputs": ["1"]},
    "name of a function, got 5": {"fn_name": 5, "inputs": [[1]], "outputs": [1]},
    "name of a function, got 'a b'": {"fn_name": "a b", "inputs": [[1]], "outputs": [1]},
    "must be an object": [["1"], ["1"]],
    "not JSON": "{'inputs': ['1']}",
}


@pytest.mark.parametrize("reason", MALFORMED)
def test_malformed_tests_are_found_when_the_row_is_read(reason):
    with pytest.raises(ValueError, match=reason):
        sft.check_tests(MALFORMED[reason])
    with pytest.raises(ValueError, match=reason):
        program_rewards([RIGHT], [{"input_output": MALFORMED[reason]}])
    if (
        "0 inputs and 0" not in reason and "JSON" not in reason
    ):  # those have no tests, or are found before
        with pytest.raises(ValueError, match=reason):
            sft.apps_row({"question": "q", "input_output": MALFORMED[reason], "solutions": ""})


def test_the_schema_is_apps_with_json_text_and_dicts():
    problem = {"input_output": json.dumps(SQUARE["input_output"]), "question": "…"}
    assert one(RIGHT, problem) == 1.0
    with pytest.raises(ValueError):
        program_rewards([RIGHT], [problem, problem])
    assert program_rewards([], []) == []


def test_rewards_do_not_depend_on_order_or_company():
    programs = [RIGHT, "def f(x): return 9", "def f(x): f.n = 1 / 0", "f(", RIGHT_SCRIPT] * 3
    programs += [
        "import sys; sys.modules.clear()",
        "import random\ndef f(x): return random.random()",
    ]
    programs += [
        "def f(x): return sorted({'a', 'b', 'c', 'd'}) and ''.join({'a', 'b', 'c', 'd', 'e'})"
    ]
    alone = {program: one(program, SQUARE) for program in set(programs)}
    for seed in range(3):
        random.Random(seed).shuffle(programs)
        rewards = program_rewards(programs, [SQUARE] * len(programs), ENOUGH)
        assert rewards == [alone[program] for program in programs]


def test_unseeded_randomness_and_set_order_are_reproducible():
    program = "import random\nprint(random.random(), list({'a', 'b', 'c', 'd'}), hash('x'))"
    servers = [reward.Server(), reward.Server()]
    test = {"program": program, "function": None, "input": "", "timeout": ENOUGH}
    answers = [server.run(test)["answer"] for server in servers * 2]
    for server in servers:
        server.stop()
    assert answers[0] and len(set(answers)) == 1


@pytest.mark.slow
def test_the_first_programs_of_a_process_are_judged_by_many_threads_at_once():
    """CPython 3.11 crashes now and then where threads parse Python at the same time: so none does."""
    source = f"""
        import os, reward, sys
        os.sched_getaffinity = lambda pid: range(8)
        sys.setswitchinterval(1e-6)
        problem = {SQUARE}
        assert reward.program_rewards([{RIGHT!r}] * 16, [problem] * 16, {ENOUGH}) == [1.0] * 16
    """
    done = run_python(textwrap.dedent(source))
    assert done.returncode == 0, done.stderr


def run_python(source, **environment):
    paths = os.pathsep.join([str(Path(reward.__file__).parent), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": paths, **environment}
    return subprocess.run(
        [sys.executable, "-c", source], env=environment, capture_output=True, text=True
    )


# A list of right programs from elsewhere: short exercises, each in four styles, each broken once.
# name: (function, arguments of three tests, what to replace by what so that it is wrong)

EXERCISES = {
    "gcd": (
        "def f(a, b):\n    while b: a, b = b, a % b\n    return a",
        [[12, 18], [7, 5], [9, 0]],
        "a % b",
        "a // (b + 1)",
    ),
    "factorial": (
        "def f(n): return 1 if n < 2 else n * f(n - 1)",
        [[0], [5], [20]],
        "n - 1",
        "n - 2",
    ),
    "fibonacci": (
        "def f(n):\n    a, b = 0, 1\n    for _ in range(n): a, b = b, a + b\n    return a",
        [[1], [10], [50]],
        "0, 1",
        "1, 1",
    ),
    "reverse words": (
        "def f(s): return ' '.join(s.split()[::-1])",
        [["a b c"], ["one"], ["x y"]],
        "[::-1]",
        "[1:]",
    ),
    "vowels": (
        "def f(s): return sum(c in 'aeiou' for c in s)",
        [["tree"], ["sky"], ["queue"]],
        "aeiou",
        "aeio",
    ),
    "is prime": (
        "def f(n): return n > 1 and all(n % d for d in range(2, n))",
        [[1], [7], [9]],
        "n > 1 and ",
        "",
    ),
    "primes below": (
        "def f(n): return [p for p in range(2, n) if all(p % d for d in range(2, p))]",
        [[10], [20], [3]],
        "range(2, n)",
        "range(1, n)",
    ),
    "mean": (
        "def f(x): return sum(x) / len(x)",
        [[[1, 2]], [[1, 1, 2]], [[0.1, 0.2]]],
        "len(x)",
        "(len(x) + 1)",
    ),
    "area": ("def f(r): return round(3.14159 * r * r, 4)", [[1], [2.5], [10]], "r * r", "r * 2"),
    "second largest": (
        "def f(x): return sorted(set(x))[-2]",
        [[[1, 2, 3]], [[5, 5, 4]], [[9, 1]]],
        "-2",
        "-1",
    ),
    "unique": (
        "def f(x): return list(dict.fromkeys(x))",
        [[[1, 1, 2]], [[3, 2, 3]], [[0]]],
        "dict.fromkeys(x)",
        "x[1:]",
    ),
    "flatten": (
        "def f(x): return [z for y in x for z in (f(y) if isinstance(y, list) else [y])]",
        [[[1, [2, 3]]], [[[[4]], 5]], [[6]]],
        "[y]",
        "[y, y]",
    ),
    "rotate": (
        "def f(x, k): return x[-k:] + x[:-k]",
        [[[1, 2, 3, 4], 1], [[1, 2, 3], 2], [[7, 8], 1]],
        "x[:-k]",
        "x[:k]",
    ),
    "binary": ("def f(n): return bin(n)[2:]", [[5], [8], [255]], "[2:]", "[1:]"),
    "from roman": (
        "def f(s):\n    v = [dict(I=1, V=5, X=10, L=50, C=100)[c] for c in s]\n    return sum(a if a >= b else -a for a, b in zip(v, v[1:] + [0]))",
        [["IX"], ["XL"], ["VIII"]],
        "-a for",
        "a for",
    ),
    "anagram": (
        "def f(a, b): return sorted(a) == sorted(b)",
        [["low", "owl"], ["aab", "abb"], ["x", "x"]],
        "sorted(b)",
        "b",
    ),
    "pascal": (
        "def f(n):\n    row = [1]\n    for k in range(n): row.append(row[-1] * (n - k) // (k + 1))\n    return row",
        [[0], [4], [6]],
        "k + 1",
        "k + 2",
    ),
    "digit sum": ("def f(n): return sum(map(int, str(n)))", [[123], [9], [1002]], "sum", "max"),
    "collatz": (
        "def f(n):\n    k = 0\n    while n > 1: n, k = (n // 2 if n % 2 == 0 else 3 * n + 1), k + 1\n    return k",
        [[1], [6], [27]],
        "k = 0",
        "k = 1",
    ),
    "longest": (
        "def f(x): return max(x, key=len)",
        [[["a", "bcd"]], [["xyz", "w"]], [["hi"]]],
        "max(x",
        "min(x",
    ),
    "triangle": (
        "def f(a, b, c): return a + b > c and b + c > a and a + c > b",
        [[3, 4, 5], [1, 2, 3], [9, 1, 1]],
        "a + b > c",
        "a + b >= c",
    ),
    "matrix product": (
        "def f(a, b): return [[sum(x * y for x, y in zip(r, c)) for c in zip(*b)] for r in a]",
        [[[[1, 2]], [[3], [4]]], [[[1, 0], [0, 1]], [[5, 6], [7, 8]]], [[[2]], [[3]]]],
        "x * y",
        "x + y",
    ),
    "run lengths": (
        "def f(s):\n    import itertools\n    return ''.join(c + str(len(list(g))) for c, g in itertools.groupby(s))",
        [["aab"], ["xyz"], ["mmmm"]],
        "str(len(list(g)))",
        "'1'",
    ),
    "balanced": (
        "def f(s):\n    d = 0\n    for c in s:\n        d += 1 if c == '(' else -1\n        if d < 0: return False\n    return d == 0",
        [["(())"], ["())("], ["(("]],
        "if d < 0: return False",
        "pass",
    ),
    "power": (
        "def f(a, b, m): return pow(a, b, m)",
        [[2, 100, 97], [3, 4, 5], [10, 9, 7]],
        "pow(a, b, m)",
        "pow(a, b + 1, m)",
    ),
    "median": (
        "def f(x):\n    x = sorted(x)\n    k = len(x) // 2\n    return x[k] if len(x) % 2 else (x[k - 1] + x[k]) / 2",
        [[[3, 1, 2]], [[1, 2, 3, 4]], [[7]]],
        "/ 2\n",
        "/ 2\n",
    ),
    "big power": ("def f(n): return 3 ** n", [[1], [50], [300]], "3 ** n", "3 ** n + 1"),
    "compound": (
        "def f(p, r, n): return p * (1 + r / 100) ** n",
        [[1000, 5, 2], [1, 10, 10], [250.5, 1.5, 3]],
        "1 +",
        "1 -",
    ),
    "common prefix": (
        "def f(a, b):\n    n = 0\n    while n < min(len(a), len(b)) and a[n] == b[n]: n += 1\n    return a[:n] or '-'",
        [["flow", "flat"], ["a", "b"], ["same", "same"]],
        "a[:n]",
        "a[:n + 1]",
    ),
    "coins": (
        "def f(n, coins):\n    ways = [1] + [0] * n\n    for c in coins:\n        for k in range(c, n + 1): ways[k] += ways[k - c]\n    return ways[n]",
        [[4, [1, 2, 3]], [10, [2, 5]], [3, [2]]],
        "[1] + [0]",
        "[1] + [1]",
    ),
    "hypotenuse": (
        "def f(a, b): return (a * a + b * b) ** 0.5",
        [[3, 4], [1, 1], [0.5, 2]],
        "a * a +",
        "a +",
    ),
}
EXERCISES["median"] = (*EXERCISES["median"][:2], "x[k - 1] + x[k]", "x[k] + x[k]")
SHOW = "def show(x): return ' '.join(map(show, x)) if isinstance(x, list) else str(x)\n"
STYLES = {
    "fast I/O": "import io, json, os, sys\n{program}\n" + SHOW + "out = io.BytesIO()\n"
    "for line in sys.stdin.buffer.read().splitlines():\n    out.write(show(f(*json.loads(line))).encode() + b'\\n')\n"
    "os.write(1, out.getvalue())",
    "class": "{program}\nclass Solution:\n    def __init__(self): self.solve = f\n"
    "    def f(self, *arguments): return self.solve(*arguments)",
    "generator": "import atexit, io, json, sys\n{program}\n" + SHOW + "def lines():\n"
    "    while line := sys.stdin.readline():\n        yield from show(f(*json.loads(line))) + '\\n'\n"
    "out = io.TextIOWrapper(sys.stdout.buffer)\natexit.register(out.flush)\nout.writelines(lines())",
    "white space": "import json\n{program}\n" + SHOW + "def main():\n"
    "    print()\n    print(' ', *show(f(*json.loads(input()))).split(), '', sep=' \\t ', end='\\r\\n\\n \\n')\n"
    "if __name__ == '__main__':\n    main()\n    exit(0)",
}


def exercise(name, style):
    """An exercise as (right program, broken program, problem)."""
    program, given, old, new = EXERCISES[name]
    assert old in program
    names = {}
    exec(program + "\n" + SHOW, names)
    if style == "class":
        problem = call(*[(arguments, names["f"](*arguments)) for arguments in given])
    else:
        said = [
            (json.dumps(arguments), names["show"](names["f"](*arguments))) for arguments in given
        ]
        problem = stdio(*said)
    right, broken = (
        STYLES[style].replace("{program}", x) for x in (program, program.replace(old, new, 1))
    )
    return right, broken, problem


@pytest.mark.slow
@pytest.mark.parametrize("style", STYLES)
def test_thirty_right_programs_earn_1_in_every_style_and_none_once_broken(style):
    right, broken, problems = zip(*[exercise(name, style) for name in EXERCISES], strict=True)
    assert len(problems) >= 30
    rewards = dict(zip(EXERCISES, program_rewards(right, problems, ENOUGH), strict=True))
    assert rewards == dict.fromkeys(EXERCISES, 1.0)
    passed = [
        name
        for name, r in zip(EXERCISES, program_rewards(broken, problems, ENOUGH), strict=True)
        if r == 1
    ]
    assert passed == []


# Hostile programs. Each is one that would earn 1.0 if its trick worked, or that attacks something outside.

NAUGHTY = {
    "infinite loop": "def f(x):\n    while True: pass",
    "sleeps": "import time\ndef f(x): time.sleep(1000)",
    "10 GB at once": "def f(x): return len(bytearray(10 << 30)) and x * x",
    "memory by and by": "def f(x):\n    a = []\n    while True: a.append(bytearray(1 << 24))",
    "raises its limits": "import resource\ndef f(x):\n    for n in range(16):\n        try: resource.setrlimit(n, (-1, -1))\n"
    "        except (ValueError, OSError): pass\n    return len(bytearray(1 << 30)) and x * x",
    "1 GB file": "def f(x):\n    with open('big', 'wb') as file:\n        for _ in range(1024): file.write(bytes(1 << 20))",
    "many files": "def f(x):\n    for n in range(100):\n        open(str(n), 'wb').write(bytes(8 << 20))\n    return x * x",
    "many inodes": "import os\ndef f(x):\n    for n in range(10**6): os.mkdir(str(n))\n    return x * x",
    "fork bomb": "import os\ndef f(x):\n    while True: os.fork()",
    "patient fork bomb": "import os\ndef f(x):\n    while True:\n        try: os.fork()\n        except OSError: pass",
    "thread bomb": "import threading, time\ndef f(x):\n    while True: threading.Thread(target=time.sleep, args=[99]).start()",
    "recursion": "def f(x): return f(x)",
    "recursion in C": "import sys\ndef f(x):\n    sys.setrecursionlimit(10**9)\n    a = []\n    for _ in range(10**6): a = [a]\n    return repr(a)",
    "segmentation fault": "import ctypes\ndef f(x): return ctypes.string_at(1)",
    "abort": "import os\ndef f(x): os.abort()",
    "sys.exit before the tests": "import sys; sys.exit(0)",
    "os._exit before the tests": "import os; os._exit(0)",
    "os._exit in the function": "import os\ndef f(x): os._exit(0)",
    "sys.exit in the function": "import sys\ndef f(x): sys.exit(0)",
    "infinite import": "while True: pass\ndef f(x): return x * x",
    "ignores signals": "import signal\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n"
    "    except (OSError, ValueError): pass\ndef f(x):\n    while True: pass",
    "blocks on a pipe": "import os\ndef f(x):\n    os.mkfifo('p')\n    open('p')",
    "kills its group": "import os\ndef f(x):\n    os.fork()\n    os.killpg(0, 9)\n    while True: pass",
    "closes everything": "import os\ndef f(x):\n    os.closerange(0, 1 << 16)\n    return x * x",
    "huge result": "def f(x): return 'a' * (20 << 20)",
    "catches its end": "def f(x):\n    try:\n        while True: pass\n    except BaseException: pass\n    finally: f(x)",
    "daemon that keeps the pipe": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(1000)\n"
    "    os._exit(0)\ndef f(x):\n    while True: pass",
}
WRONG = {  # they run, and pass no test
    "always equal": "class E:\n    def __eq__(self, other): return True\ndef f(x): return E()",
    "always equal int": "class E(int):\n    def __eq__(self, other): return True\n    __hash__ = int.__hash__\ndef f(x): return E(1)",
    "always equal list": "class E(list):\n    def __eq__(self, other): return True\ndef f(x): return E([1])",
    "patched comparison": "import builtins, json, operator\noperator.eq = lambda a, b: True\nbuiltins.all = builtins.any = lambda a: True\n"
    "json.loads = json.JSONDecoder.decode = lambda *a: 9\ndef f(x): return None",
    "patched serialiser": "import json\njson.dumps = lambda v: '[true]'\ndef f(x): return x * x",
    "result that is not JSON": "import json\njson.dumps = lambda v: 'ran'\ndef f(x): return x * x",
    "prints a verdict": """def f(x): print('["ran", "9"]\\n3 passed\\nOK\\n1.0', flush=True)""",
    "generator": "def f(x): yield x * x",
    "set": "def f(x): return {x * x}",
    "circular": "def f(x):\n    a = []\n    a.append(a)\n    return a",
    "deeply nested": "import json\njson.dumps = lambda v: '[' * 10**6\ndef f(x): return 1",
    "nested a little less": "import json\njson.dumps = lambda v: '[' * 900 + ']' * 900\ndef f(x): return 1",
    "NaN": "def f(x): return float('nan')",
    "infinity": "def f(x): return float('inf')",
    "huge integer": "def f(x): return 10 ** 20000",
    "lone surrogate": "def f(x): return '\\ud800'",
    "bytes": "def f(x): return b'9'",
    "everything": "def f(x): return [n for n in range(100)]",
    "complex": "def f(x): return 9 + 0j",
    "forged on every descriptor": 'import os\ndef f(x):\n    for n in range(256):\n        try: os.write(n, b\'["ran", "9"]\\n\')\n'
    "        except OSError: pass\n    return 0",
}
BROKEN = {  # compile errors
    "parentheses": "(" * 100000,
    "deep expression": "x = " + "-" * 200000 + "1",
    "null byte": "def f(x): return x * x\0",
    "lone surrogate in the source": "def f(x): return x * x  # \ud800",
    "indentation": "def f(x):\nreturn x * x",
    "unknown encoding": "\ufeffdef f(x) -> : pass",
    "nested blocks": "\n".join("  " * n + "if x:" for n in range(200)),
    "prose": "Sure! Here is the program that you asked for.",
}
BOMBS = {
    "power of powers": "x = 9 ** 9 ** 9\ndef f(x): return x * x",
    "shift": "x = 1 << (1 << 40)\ndef f(x): return 9",
}

# Tricks to get at the secret, the test's expected output. They print all that they can read.
SEARCH = """
import os, sys
found = []
def look(*paths):
    for path in paths:
        try: found.append(open(path, 'rb').read(1 << 20).decode('latin1'))
        except OSError: pass
{}
text = ' '.join(map(str, found))
at = text.find('secret-')
print(text[at:].split('"')[0].split("'")[0].split(chr(0))[0].split()[0] if at >= 0 else 'nothing')
"""
STEAL = {
    "its environment": "found.append(dict(os.environ))",
    "others' environments": "look(*[f'/proc/{n}/environ' for n in range(1, 70000)])",
    "its parent's environment": "look(f'/proc/{os.getppid()}/environ')",
    "others' command lines": "look(*[f'/proc/{n}/cmdline' for n in range(1, 70000)])",
    "a file of ours": "look({file!r})",
    "a file of ours through a link": "os.symlink({file!r}, 'a'); look('a', '../../../../..' + {file!r})",
    "a hard link": "try: os.link({file!r}, 'b')\nexcept OSError: pass\nlook('b')",
    "temporary files": "import glob\nlook(*glob.glob({folder!r} + '/**', recursive=True))",
    "frames of the harness": "frame = sys._getframe()\nwhile frame:\n    found.extend([frame.f_locals, frame.f_globals])\n    frame = frame.f_back",
    "all objects": "import gc\nfound.extend(repr(o)[:10000] for o in gc.get_objects() if type(o) in (dict, list, tuple))",
    "memory of the keeper": "look(f'/proc/{os.getppid()}/mem', '/proc/self/mem')",
    "descriptors": "for n in range(256):\n    try: found.append(os.pread(n, 1 << 20, 0)); found.append(os.read(n, 1 << 20))\n    except OSError: pass",
    "another root": "import ctypes\nlibc = ctypes.CDLL(None)\nlibc.unshare(0x10020000)\nlibc.setuid(0)\nlibc.setns(3, 0)\n"
    "libc.mount(b'proc', b'.', b'proc', 0, None)\ntry: os.chroot('.')\nexcept OSError: pass\nlook({file!r})",
    "a shell": "import subprocess\ntry: found.append(subprocess.run('cat ' + {file!r}, shell=True, capture_output=True).stdout)\n"
    "except OSError: pass\nos.system('cat ' + {file!r})",
    "the dynamic loader": "import glob\nfor path in glob.glob('/lib*/ld-linux*'):\n    if os.fork() == 0:\n"
    "        try: os.execv(path, [path, '/bin/cat', {file!r}])\n        finally: os._exit(0)\n    os.wait()",
    "ptrace": "import ctypes\nlibc = ctypes.CDLL(None)\nassert libc.ptrace(16, os.getppid(), 0, 0) < 0\nassert libc.ptrace(16, {victim}, 0, 0) < 0",
}
# Attacks on what is outside: their own results are right, and may be paid for.
ATTACK = {
    "rm -rf of its parents": "for path in ({folder!r}, '.', '..', '/'): shutil.rmtree(path, ignore_errors=True)",
    "writes to our folder": "for path in ({file!r}, {folder!r} + '/new', {place!r}, '/tmp/../' + {place!r}):\n"
    "    with contextlib.suppress(OSError): open(path, 'w').write('gone')",
    "appends, truncates, renames": "with contextlib.suppress(OSError): os.truncate({file!r}, 0)\n"
    "with contextlib.suppress(OSError): os.rename({file!r}, {file!r} + '.old')",
    "changes modes and times": "for act in (lambda: os.chmod({file!r}, 0), lambda: os.chmod({folder!r}, 0), lambda: os.utime({file!r}, (0, 0))):\n"
    "    with contextlib.suppress(OSError): act()",
    "links to write through": "os.symlink({folder!r}, 'link')\nwith contextlib.suppress(OSError): open('link/file', 'w').write('gone')",
    "links for the cleaner": "os.mkdir('d'); os.symlink({folder!r}, 'd/link'); os.symlink('/', 'root'); os.chmod('d', 0o777)",
    "chmod of its own folder": "os.mkdir('d'); os.chmod('d', 0); os.chmod('.', 0)",
    "kills our process": "for pid in ({victim}, {us}, os.getppid(), -1):\n    with contextlib.suppress(OSError): os.kill(pid, 9)",
    "stops our process": "for pid in ({victim}, {us}, os.getppid()):\n    with contextlib.suppress(OSError): os.kill(pid, 19)",
    "stops itself": "os.kill(os.getpid(), 19)",
    "connects by TCP": "with contextlib.suppress(OSError):\n    s = socket.create_connection(('127.0.0.1', {port}), 1)\n    s.sendall(b'hello')",
    "sends by UDP": "with contextlib.suppress(OSError): socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'hello', ('127.0.0.1', {udp}))",
    "connects to an abstract socket": "with contextlib.suppress(OSError):\n"
    "    s = socket.socket(socket.AF_UNIX); s.connect('\\0' + {unix!r}); s.sendall(b'hello')",
    "leaves a daemon": "if os.fork() == 0:\n    os.setsid()\n    if os.fork():\n        os._exit(0)\n    os.closerange(0, 256)\n    time.sleep(1000)",
    "leaves a thread": "import threading\nthreading.Thread(target=time.sleep, args=[1000], daemon=True).start()",
    "leaves shared memory": "import ctypes\nctypes.CDLL(None).shmget(77, 1 << 20, 0o1666)",
    "becomes root": "for act in (lambda: os.setuid(0), lambda: os.setgid(0), lambda: os.setgroups([0]), lambda: os.nice(-5)):\n"
    "    with contextlib.suppress(OSError): act()\nassert os.geteuid() == {euid} or os.geteuid() > 0",
    "damages the library": "for path in (os.__file__, random.__file__):\n    with contextlib.suppress(OSError): open(path, 'a').write('1 / 0')",
    "ends its keeper by ctypes": "import ctypes\nlibc = ctypes.CDLL(None)\nfor pid in ({us}, {victim}, os.getppid()): libc.kill(pid, 9)",
    "patches the harness": "import __main__, builtins\nfor name in dir(__main__):\n    if not name.startswith('__'): setattr(__main__, name, None)\n"
    "builtins.print = builtins.open = None",
}
HEAD = "import contextlib, os, random, shutil, socket, time\n"
# What never ends by itself (or, of late, only after minutes of work): it gets SHORT seconds.
ENDLESS = {
    *(
        "infinite loop",
        "sleeps",
        "memory by and by",
        "many inodes",
        "fork bomb",
        "patient fork bomb",
    ),
    *("thread bomb", "infinite import", "ignores signals", "blocks on a pipe", "kills its group"),
    *("catches its end", "daemon that keeps the pipe", "power of powers", "stops itself"),
    *(
        "kills our process",
        "stops our process",
        "leaves a daemon",
        "ends its keeper by ctypes",
        "rm -rf of its parents",
    ),
}
QUICK = {  # the others are marked slow
    *("infinite loop", "10 GB at once", "many files", "fork bomb", "os._exit in the function"),
    *("closes everything", "always equal", "forged on every descriptor", "parentheses"),
    *("frames of the harness", "memory of the keeper", "a file of ours"),
    *("kills our process", "connects by TCP", "leaves a daemon", "leaves shared memory"),
}
# Without a sandbox, others' files and the network are open: tested are the limits, and what stays safe.
INSIDE = {
    *NAUGHTY.keys() - {"many files", "many inodes"},
    *(*WRONG, *BROKEN, *BOMBS),
    *("its environment", "its parent's environment", "frames of the harness", "all objects"),
    *("memory of the keeper", "descriptors", "links for the cleaner", "chmod of its own folder"),
    *("stops itself", "leaves a thread", "patches the harness"),
}
if (
    os.geteuid() != 0
):  # the server is of the same user as all else: these would stop or kill more than it
    INSIDE -= {"thread bomb", "fork bomb", "patient fork bomb", "daemon that keeps the pipe"}


def cases(*parts):
    """The programs of `parts` in both ways of running, those that take long marked slow."""
    found = []
    for part, way in itertools.product(parts, ("sandbox", "limits")):
        for name in part if way == "sandbox" else [name for name in part if name in INSIDE]:
            marks = [] if name in QUICK else [pytest.mark.slow]
            marks += [bubblewrap] if way == "sandbox" else []
            found.append(pytest.param(way, name, marks=marks, id=f"{way}-{name}"))
    return pytest.mark.parametrize(("way", "name"), found)


@pytest.fixture(scope="module")
def pools():
    """A server for each way of running, in the form that `reward.server_pool` has."""
    found = {}
    for way in ("sandbox", "limits"):
        idle = queue.SimpleQueue()
        idle.put(reward.Server())
        found[way] = idle, ThreadPoolExecutor(1)
    yield found
    for idle, threads in found.values():
        idle.get().stop()
        threads.shutdown()


@pytest.fixture
def ways(pools, monkeypatch):
    """A function that makes programs run in one of the WAYS, all in the same server; returns that."""

    def choose(way):
        if way == "limits":
            monkeypatch.setattr(reward, "sandbox", lambda: [])
        monkeypatch.setattr(reward, "server_pool", lambda process: pools[way])
        server = pools[way][0].get()
        pools[way][0].put(server)
        return server

    return choose


@pytest.fixture
def attack(ways, outside):
    """Run a hostile program and then a right one in the same server -> how the hostile one ended."""

    def run(way, name, program, problem):
        server = ways(way)
        (result,) = run_programs(
            [fill(program, outside)], [problem], SHORT if name in ENDLESS else ENOUGH
        )
        assert run_programs([RIGHT], [SQUARE], ENOUGH) == [("ran", 3, 3)], "the next program"
        assert_nothing_is_left(server, way)
        return result

    return run


def assert_nothing_is_left(server, way):
    """No process outlives its program: only the server is there, in its sandbox between two of bwrap's."""
    if sys.platform != "linux":
        return
    end = "\0".join(["", *server.process.args[-2:], ""]).encode()
    wanted = 3 if way == "sandbox" else 1
    began = time.monotonic()
    while (found := processes(end)) > wanted and time.monotonic() < began + ENOUGH:
        time.sleep(0.05)
    assert found == wanted


def processes(end):
    """The number of living processes whose command line ends so; a fork has its parent's."""
    count = 0
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            count += (path / "cmdline").read_bytes().endswith(end) and state(path.name) != "Z"
    return count


def state(pid):
    """R, S, T, Z, … of a process."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


@pytest.fixture(scope="module")
def outside():
    """What there is to attack: a file with the secret, a process, sockets, our environment."""
    folder = Path(tempfile.mkdtemp(prefix="sandbox-test-"))
    file = folder / "file"
    file.write_text(SECRET)
    folder.chmod(0o777), file.chmod(0o666)  # so that permissions alone protect nothing
    old = os.environ.get("SANDBOX_TEST")
    os.environ["SANDBOX_TEST"] = SECRET
    victim = subprocess.Popen(["sleep", "100000"], env={"SANDBOX_TEST": SECRET})
    tcp, udp = (
        socket.create_server(("127.0.0.1", 0)),
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
    )
    udp.bind(("127.0.0.1", 0))
    abstract = socket.socket(socket.AF_UNIX)
    if sys.platform == "linux":
        abstract.bind("\0" + SECRET), abstract.listen()
    sockets = {"tcp": tcp, "udp": udp, "unix": abstract}
    facts = {"file": str(file), "folder": str(folder), "victim": victim.pid, "us": os.getpid()}
    facts |= {"euid": os.geteuid(), "port": tcp.getsockname()[1], "udp": udp.getsockname()[1]}
    yield facts | {"unix": SECRET, "place": PLACE, "sockets": sockets, "before": snapshot(folder)}
    victim.kill(), victim.wait()
    for server in sockets.values():
        server.close()
    os.environ.pop("SANDBOX_TEST") if old is None else os.environ.update(SANDBOX_TEST=old)
    folder.chmod(0o700), file.unlink(), folder.rmdir()


def fill(text, facts):
    """Put facts at the place of their names in braces."""
    for name, value in facts.items():
        text = text.replace(f"{{{name}!r}}", repr(value)).replace(f"{{{name}}}", str(value))
    return text


def snapshot(folder):
    """Names, modes, times and contents of a folder."""
    found = {}
    for path in (folder, *sorted(folder.rglob("*"))):
        about = path.stat()
        content = path.read_bytes() if path.is_file() else b""
        found[str(path)] = stat.S_IMODE(about.st_mode), about.st_mtime_ns, content
    return found


@cases(NAUGHTY, BOMBS)
def test_a_program_that_breaks_the_rules_is_a_runtime_error(attack, way, name):
    status, _, _ = attack(way, name, (NAUGHTY | BOMBS)[name], SQUARE)
    assert status in ("runtime error", "time-out")


@cases(WRONG)
def test_a_result_that_is_not_the_expected_data_passes_no_test(attack, way, name):
    assert attack(way, name, WRONG[name], SQUARE) == ("ran", 0, 3)


@cases(BROKEN)
def test_source_that_cannot_be_compiled_is_a_compile_error(attack, way, name):
    assert attack(way, name, BROKEN[name], SQUARE) == ("compile error", 0, 3)


@cases(STEAL)
def test_the_expected_output_cannot_be_stolen(attack, way, name):
    status, passed, _ = attack(way, name, SEARCH.replace("{}", STEAL[name]), stdio(("", SECRET)))
    assert passed == 0
    assert status == "ran" or name == "memory of the keeper", (
        "the program itself is at fault: it proves nothing"
    )


@cases(ATTACK)
def test_an_attack_on_the_outside_earns_at_most_what_is_right_and_changes_nothing(
    attack, outside, way, name
):
    program = HEAD + ATTACK[name] + "\n" + RIGHT_SCRIPT
    assert attack(way, name, program, DOUBLE) in [
        ("ran", 3, 3),
        ("runtime error", 0, 3),
        ("time-out", 0, 3),
    ]
    assert snapshot(Path(outside["folder"])) == outside["before"] and not Path(PLACE).exists()
    if sys.platform == "linux":
        assert state(outside["victim"]) == "S"  # alive, and not stopped
        assert state(os.getpid()) != "T"
    for socket_name, server in outside["sockets"].items():
        server.settimeout(0)
        with pytest.raises(OSError):
            server.recv(99) if socket_name == "udp" else server.accept()


# The servers


@pytest.mark.parametrize("way", WAYS)
def test_a_server_that_was_killed_is_replaced_before_it_costs_a_program_its_reward(way, ways):
    server = ways(way)
    assert one(RIGHT, SQUARE) == 1.0
    os.killpg(server.process.pid, 9)
    server.process.wait()
    assert one(RIGHT, SQUARE) == 1.0


@pytest.mark.parametrize("way", WAYS)
def test_a_program_that_kills_its_server_has_a_runtime_error(way, ways):
    ways(way)
    kill = "import os, time\ndef f(x): os.kill(os.getppid(), 9); time.sleep(1); return x * x"
    assert run_programs([kill, RIGHT], [SQUARE] * 2, ENOUGH) == [
        ("runtime error", 0, 3),
        ("ran", 3, 3),
    ]


@pytest.mark.parametrize("way", [WAYS[0], "limits"] if os.geteuid() == 0 else WAYS[:1])
def test_a_program_may_have_a_dozen_processes_and_not_hundreds(way, ways):
    server = ways(way)
    program = """
        import os, signal
        count = 0
        while count < 200:
            try:
                if os.fork() == 0:
                    signal.pause()
                count += 1
            except OSError:
                break
        print(8 <= count < 16)
    """
    for _ in range(3):
        if way == "limits":  # where those that are dying still count
            server.stop()
        assert one(textwrap.dedent(program), stdio(("", "True"))) == 1.0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is no /proc")
def test_a_program_cannot_look_into_its_server_or_write_to_its_pipes(way, ways):
    ways(way)
    program = """
        import os
        for path in ("fd", "mem", "environ", "maps"):
            try:
                path = f"/proc/{os.getppid()}/{path}"
                print(os.listdir(path) if path.endswith("fd") else open(path, "rb"))
            except PermissionError:
                print("no")
    """
    assert one(textwrap.dedent(program), stdio(("", "no\n" * 4))) == 1.0


@pytest.mark.parametrize("way", WAYS)
def test_a_program_meets_no_file_of_another(way, ways):
    ways(way)
    leave = "import os, tempfile\nfor path in ('a', tempfile.gettempdir() + '/b'): open(path, 'w').write('x')\n"
    look = "import os, tempfile\nassert not os.listdir('.') and not os.listdir(tempfile.gettempdir())\n"
    programs = [look + leave + RIGHT_SCRIPT, look + RIGHT_SCRIPT]
    assert program_rewards(programs, [DOUBLE] * 2, ENOUGH) == [1.0, 1.0]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_processes_and_folders_end_with_the_interpreter(way, tmp_path):
    source = f"""
        import os, reward
        if {way == "limits"}: reward.sandbox = lambda: []
        assert reward.program_rewards([{RIGHT!r}] * 4, [{SQUARE}] * 4, {ENOUGH}) == [1.0] * 4
        server = reward.server_pool(os.getpid())[0].get()
        print(server.process.pid)
    """
    done = run_python(textwrap.dedent(source), TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)


def test_without_a_sandbox_a_warning_says_so_once(ways, capfd):
    server = ways("limits")
    reward.say_once.cache_clear()
    server.stop()
    assert one(RIGHT, SQUARE) == 1.0
    server.stop()
    assert one(RIGHT, SQUARE) == 1.0
    assert capfd.readouterr().err.count("apt install bubblewrap") == 1


def test_without_a_sandbox_a_models_programs_are_refused_unless_they_are_trusted(
    monkeypatch, capsys
):
    monkeypatch.setattr(reward, "sandbox", lambda: [])
    with pytest.raises(SystemExit) as stop:
        reward.check_sandbox("apps")
    (line,) = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "apt install bubblewrap" in line and "--trust_programs" in line
    for task, trust in (("apps", True), ("toy-code", False), ("toy", False), ("hh", False)):
        reward.check_sandbox(task, trust)
    monkeypatch.setattr(reward, "sandbox", lambda: ["bwrap"])
    reward.check_sandbox("apps")


def test_where_bubblewrap_is_missing_or_refused_there_is_no_sandbox(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    reward.sandbox.cache_clear()
    assert reward.sandbox() == []
    (tmp_path / "bwrap").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    reward.sandbox.cache_clear()
    assert reward.sandbox() == []
    reward.sandbox.cache_clear()
