"""Chapter 2, programs: right ones earn 1 however they are written, hostile ones gain and harm nothing."""

# ruff: noqa: E501  (programs are easier to read in a line of their own)
import json
import os
import random
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest

import ma_ppo
import reward
from reward import program_rewards

ENOUGH = 60.0  # seconds, for what ends by itself: however busy the machine is
SHORT = 0.1  # for what never ends
needs_bubblewrap = pytest.mark.skipif(
    not reward.sandbox(), reason="bubblewrap is missing, or may not make namespaces"
)


@pytest.fixture(params=[pytest.param("sandbox", marks=needs_bubblewrap), "limits"])
def way(request, monkeypatch):
    """How programs are run: under bubblewrap, or under limits only."""
    if request.param == "limits":
        monkeypatch.setattr(reward, "sandbox", lambda: [])
    return request.param


def problem(inputs, outputs, function=""):
    return {"input_output": {"fn_name": function, "inputs": inputs, "outputs": outputs}}


def earn(programs, problem, timeout=ENOUGH):
    """{name: reward} of {name: program}."""
    rewards = program_rewards(list(programs.values()), [problem] * len(programs), timeout)
    return dict(zip(programs, rewards, strict=True))


SQUARE = problem([[3], [5], [7]], [9, 25, 49], "f")
DOUBLE = problem(["3", "5\n", ["7", ""]], ["6", "10\n", ["14"]])
END = problem(["end\n"], ["end"])
RIGHT, RIGHT_SCRIPT = "def f(x): return x * x", "print(2 * int(input()))"


# What right, wrong and broken programs earn


def test_rewards_are_the_papers_formula_worked_by_hand(way):
    partly = "def f(x): return x * x if x < limit else 0\nlimit = "
    programs = [RIGHT, partly + "6", partly + "4", partly + "0"]
    programs += ["def f(x): return 1 / (x - 7)", "def f(x) return x"]
    wanted = [1.0, -0.3 + 1.3 * 2 / 3, -0.3 + 1.3 / 3, -0.3, -0.6, -1.0]
    assert program_rewards(programs, [SQUARE] * 6, ENOUGH) == wanted
    assert program_rewards(programs[::-1], [SQUARE] * 6, ENOUGH) == wanted[::-1]
    late = "def f(x):\n    while x == 7: pass\n    return x * x"
    assert program_rewards([late], [SQUARE], SHORT) == [-0.6]  # one test that fails is enough,
    spoiled = "open('a', 'w')\ndef f(x): return x * x + 0 // (x - 3)"
    assert program_rewards([spoiled], [SQUARE], ENOUGH) == [-0.6]  # also if the sandbox is left


def test_tests_are_data_or_their_json_text_and_every_input_has_an_output():
    text = {"input_output": json.dumps(SQUARE["input_output"])}
    assert program_rewards([RIGHT, RIGHT_SCRIPT], [text, DOUBLE], ENOUGH) == [1.0, 1.0]
    assert program_rewards([], []) == []
    for problems in ([SQUARE, SQUARE], [problem(["1", "2"], ["2"])]):
        with pytest.raises(ValueError):
            program_rewards([RIGHT], problems)


# What is printed = what is expected; _ is a space, and ⏎ a newline.
SAME = "__a_b_⏎⏎c⏎⏎=a_b⏎⏎c⏎ ⏎_⏎= 0.30000000000000004=0.3 0.333333=0.333333333 0.3334=0.33341 2.0=2"
SAME += " 1234567.9=1234568.0 1.0000001_2.5⏎3=1_2.50⏎3.0 b⏎a=a⏎b b_a=a_b"  # any order, as in APPS
SAME += " 1.9999999=2 1e5=100000"
DIFFERENT = "100001.0=100000 100000.9=100000 1.00001e5=100000 100001=100000 0.334=0.333 nan=1 inf=1 a_b=a_b_b 1.0_2=1_2_3 YES⏎NO=YES⏎NO⏎YES a⏎b=a_b yes=YES --5=-5"


@pytest.mark.parametrize("pair", [*SAME.split(), *DIFFERENT.split()])
def test_printed_text_is_compared_as_apps_does(pair):
    printed, expected = pair.replace("_", " ").replace("⏎", "\n").split("=")
    assert reward.same_output(printed, expected) == (pair in SAME.split())
    assert reward.same_output(printed, expected.split("\n")) == (pair in SAME.split())


def test_whole_numbers_of_4400_digits_are_compared_digit_by_digit():
    assert reward.same_output("7" * 4400, "7" * 4400)
    assert not reward.same_output("7" * 4399 + "8", "7" * 4400)


BIG = 10**4400 + 7
HASH, HASH_SEED = [reward.PYTHON, "-c", "print(hash('x'))"], {"PYTHONHASHSEED": "0"}
CALLS = {  # programs that are right, the arguments and the result that is expected
    "def f(): return (1, (2, 'ä')), {3: None}": ([], [[1, [2, "ä"]], {"3": None}]),
    "def f(): return 2": ([], [2]),  # APPS wraps some results
    "def f(): return 2.0": ([], 2),
    "def f(): return fractions.Fraction(1, 2)": ([], 0.5),
    "f = lambda *a, b=1: [*a, b]\nprint('noise')": ([5, 6], [5, 6, 1]),
    "if __name__ == '__main__': 1 / 0\ndef f(): return deque([1]).pop()": ([], 1),
    "class Solution:\n    def f(self, xs: List[int]) -> int: return max(xs)": ([[1, 3, 2]], 3),
    "def f(xs): return 0\nclass Solution:\n    def f(self, xs): return max(xs)": ([[1, 3, 2]], 3),
    "def f(d, n): return d[n]": ([{"1": 5}, 1], 5),  # JSON made the key text
    "def f(d): return sorted(d)": ([{"10": 0, "9": 0, "-1": 0}], [-1, 9, 10]),
    "def f(d): return d['a'], d['1']": ([{"a": 1, "1": 2}], [1, 2]),  # not all are ints
    "def f(n): return Counter([n, n])": ([1], {"1": 2}),
    "def f(x): return x + 1": ([BIG], BIG + 1),
    "def f(): return random.random()": ([], random.Random(0).random()),  # always the same
    "def f(): return hash('x')": ([], int(subprocess.check_output(HASH, env=HASH_SEED))),
}
MISSES = {
    "def f(): return 1": ([], [1, 2]),
    "def f(): return '2'": ([], 2),
    "def f(): return 0.1 + 0.2": ([], 0.3),  # as APPS has it: only text is rounded
    "def f(n): return {n: [n]}": ([1], {"2": [1]}),
    "def f(x): return x + 2": ([BIG], BIG + 1),
    "def f(x): return str(x)": ([BIG], BIG),
}


def test_results_are_compared_as_plain_data():
    table = CALLS | MISSES
    problems = [problem([given], [result], "f") for given, result in table.values()]
    rewards = program_rewards(list(table), problems, ENOUGH)
    wanted = dict.fromkeys(CALLS, 1.0) | dict.fromkeys(MISSES, -0.3)
    assert dict(zip(table, rewards, strict=True)) == wanted


ENDS = {
    "reads and writes": "import sys\nsys.stdout.write(sys.stdin.readline())",
    "buffers": "import sys\nsys.stdout.buffer.write(sys.stdin.buffer.read())",
    "/dev": "open('/dev/stdout', 'w').write(open('/dev/stdin').read())",
    "exit": "print('end'); exit()",
    "SystemExit": "print('end'); raise SystemExit",
    "os._exit": "import os, sys; print('end'); sys.stdout.flush(); os._exit(0)",
    "os.write": "import os; os.write(1, b'end')",
    "a thread": "import threading, time\nthreading.Thread(target=lambda: (time.sleep(0.1), print('end'))).start()",
    "a big stack": "import threading\nthreading.stack_size(1 << 28)\nthreading.Thread(target=lambda: print('end')).start()",
    "an executor": "from concurrent.futures import ThreadPoolExecutor\nThreadPoolExecutor(2).submit(print, 'end')",
    "atexit": "import atexit, io, sys\nsys.stdout = io.StringIO()\natexit.register(lambda: sys.__stdout__.write(sys.stdout.getvalue()))\nprint('end')",
    "a wrapper": "import io, sys\nsys.stdout = io.TextIOWrapper(sys.stdout.detach(), 'utf-8')\nprint('end')",
    "a file": "def main():\n    file = open(1, 'w')\n    file.write('end')\n    exit()\nmain()",
    "a copy of the descriptor": "import os\nfile = os.fdopen(os.dup(1), 'w')\nfile.write('end')",
    "closes it, and goes on": "import os, time\nos.write(1, b'end'); os.close(1); time.sleep(0.1); x = [1] * 10**6",
    "sys.stdout.close": "import sys\nprint('end'); sys.stdout.close()",
    "a file in a cycle": "class A: pass\na = A(); a.a = a; a.file = open(1, 'w', closefd=False); a.file.write('end')",
    "__del__": "import os\nclass Out:\n    def __del__(self): os.write(1, b'end')\nout = Out()",
    "a child": "import os\nif os.fork() == 0:\n    print('end')\nelse:\n    os.wait()",
    "a child that stays": "import os, time\nprint('end', flush=True)\nif os.fork() == 0: time.sleep(1000)",
    "a dataclass": "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: int = 0\nprint('end')",
    "pickle": "import pickle\nclass A: x = 'end'\nprint(pickle.loads(pickle.dumps(A())).x)",
    "cannot look into its runner": "import os\nno = 0\nfor name in ('mem', 'environ', 'maps', 'fd/0'):\n    try: open(f'/proc/{os.getppid()}/{name}', 'rb')\n    except PermissionError: no += 1\nprint('end' if no == 4 else no)",
    "a fence": "```python\nprint('end')\n```",
    "a fence in prose": "Sure! Here it is:\n\n1. Write\n   ```py\r\n   print('end')\n   ```\nTry\n```\nnonsense(\n```\n",
    "a fence that is cut off": "````Python\nprint('end')",
    "a fence in a text": '"""\n```\nprint(1)\n```\n"""\nprint("end")',
}


def test_a_script_may_end_in_any_way_that_python_knows(way):
    assert earn(ENDS, END) == dict.fromkeys(ENDS, 1.0)
    for end in ("exit(1)", "raise SystemExit('no')", "1 / 0"):  # it has not finished
        assert program_rewards([f"print('end'); {end}"], [END], ENOUGH) == [-0.6]


# Hostile programs. Each would earn more if its trick worked, or attacks something outside.

ENDLESS = {
    "infinite loop": "def f(x):\n    while True: pass",
    "infinite import": "while True: pass\ndef f(x): return x * x",
    "sleeps": "import time\ndef f(x): time.sleep(1000)",
    "memory by and by": "def f(x):\n    a = []\n    while True: a.append(bytearray(1 << 24))",
    "many inodes": "import os\ndef f(x):\n    for n in range(10**6): os.mkdir(str(n))\n    return x * x",
    "fork bomb": "import os\ndef f(x):\n    while True: os.fork()",
    "patient fork bomb": "import os\ndef f(x):\n    while True:\n        try: os.fork()\n        except OSError: pass",
    "thread bomb": "import threading, time\ndef f(x):\n    while True: threading.Thread(target=time.sleep, args=[99]).start()",
    "ignores signals": "import signal\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n    except (OSError, ValueError): pass\ndef f(x):\n    while True: pass",
    "blocks on a pipe": "import os\ndef f(x):\n    os.mkfifo('p')\n    open('p')",
    "kills its group": "import os\ndef f(x):\n    os.fork()\n    os.killpg(0, 9)\n    while True: pass",
    "stops itself": "import os\ndef f(x): os.kill(os.getpid(), 19)",
    "catches its end": "def f(x):\n    try:\n        while True: pass\n    except BaseException: pass\n    finally: f(x)",
    "daemon that keeps the pipe": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(1000)\n    os._exit(0)\ndef f(x):\n    while True: pass",
    "power of powers": "x = 9 ** 9 ** 9\ndef f(x): return x * x",
}
NAUGHTY = {
    "10 GB at once": "def f(x): return len(bytearray(10 << 30)) and x * x",
    "raises its limits": "import resource\ndef f(x):\n    for n in range(16):\n        try: resource.setrlimit(n, (-1, -1))\n        except (ValueError, OSError): pass\n    return len(bytearray(1 << 30)) and x * x",
    "1 GB file": "def f(x):\n    with open('big', 'wb') as file:\n        for _ in range(1024): file.write(bytes(1 << 20))",
    "many files": "def f(x):\n    for n in range(100): open(str(n), 'wb').write(bytes(8 << 20))\n    return x * x",
    "recursion": "def f(x): return f(x)",
    "recursion in C": "import sys\ndef f(x):\n    sys.setrecursionlimit(10**9)\n    a = []\n    for _ in range(10**6): a = [a]\n    return repr(a)",
    "segmentation fault": "import ctypes\ndef f(x): return ctypes.string_at(1)",
    "abort": "import os\ndef f(x): os.abort()",
    "exits before the tests": "import sys; sys.exit(0)",
    "os._exit before the tests": "import os; os._exit(0)",
    "os._exit in the function": "import os\ndef f(x): os._exit(0)",
    "sys.exit in the function": "import sys\ndef f(x): sys.exit(0)",
    "closes everything": "import os\ndef f(x):\n    os.closerange(0, 1 << 16)\n    return x * x",
    "huge result": "def f(x): return 'a' * (20 << 20)",
    "shift": "x = 1 << (1 << 40)\ndef f(x): return 9",
}
WRONG = {  # they run, and pass no test
    "always equal": "class E:\n    def __eq__(self, other): return True\ndef f(x): return E()",
    "always equal int": "class E(int):\n    def __eq__(self, other): return True\n    __hash__ = int.__hash__\ndef f(x): return E(1)",
    "always equal list": "class E(list):\n    def __eq__(self, other): return True\ndef f(x): return E([1])",
    "patched comparison": "import builtins, json, operator\noperator.eq = lambda a, b: True\nbuiltins.all = builtins.any = lambda a: True\njson.loads = json.JSONDecoder.decode = lambda *a: 9\ndef f(x): return None",
    "patched serialiser": "import json\njson.dumps = lambda v, **o: '[true]'\ndef f(x): return x * x",
    "result that is not JSON": "import json\njson.dumps = lambda v, **o: 'ran'\ndef f(x): return x * x",
    "prints a verdict": """def f(x): print('["ran", "9"]\\n3 passed\\nOK\\n1.0', flush=True)""",
    "generator": "def f(x): yield x * x",
    "set": "def f(x): return {x * x}",
    "circular": "def f(x):\n    a = []\n    a.append(a)\n    return a",
    "deeply nested": "import json\njson.dumps = lambda v, **o: '[' * 10**6\ndef f(x): return 1",
    "nested a little less": "import json\njson.dumps = lambda v, **o: '[' * 900 + ']' * 900\ndef f(x): return 1",
    "NaN": "def f(x): return float('nan')",
    "infinity": "def f(x): return float('inf')",
    "huge integer": "def f(x): return 10 ** 20000",
    "million digits": "import json\njson.dumps = lambda v, **o: '9' * (1 << 22)\ndef f(x): return 1",
    "lone surrogate": "def f(x): return '\\ud800'",
    "bytes": "def f(x): return b'%d' % (x * x)",
    "everything": "def f(x): return [n for n in range(100)]",
    "complex": "def f(x): return x * x + 0j",
    "forged on every descriptor": 'import os\ndef f(x):\n    for n in range(256):\n        try: os.write(n, b\'["ran", "%d"]\\n\' % (x * x))\n        except OSError: pass\n    return 0',
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
BOMBS = ["fork bomb", "patient fork bomb", "thread bomb", "daemon that keeps the pipe"]
SHARED = ["many files", "many inodes"]  # without a sandbox, the disk is everybody's


def test_hostile_programs_earn_no_more_than_honest_failures_and_the_next_one_what_is_right(way):
    left_out = [] if way == "sandbox" else SHARED + BOMBS * (os.geteuid() != 0)
    endless = {name: program for name, program in ENDLESS.items() if name not in left_out}
    assert earn(endless, SQUARE, SHORT) == dict.fromkeys(endless, -0.6)
    wanted = dict.fromkeys(NAUGHTY, -0.6) | dict.fromkeys(WRONG, -0.3) | dict.fromkeys(BROKEN, -1.0)
    programs, expected = {}, {}
    for name, program in (NAUGHTY | WRONG | BROKEN).items():
        if name not in left_out:
            programs |= {name: program, f"after {name}": RIGHT}
            expected |= {name: wanted[name], f"after {name}": 1.0}
    assert earn(programs, SQUARE) == expected


# Tricks to get at a secret, which is the expected output. They print all that they can read.
SEARCH = """
import os, sys
found = []
def look(*paths):
    for path in paths:
        try: found.append(open(path, 'rb').read(1 << 20).decode('latin1'))
        except OSError: pass
{trick}
text = ' '.join(map(str, found))
at = text.find('secret-')
print(text[at : at + 23] if at >= 0 else 'nothing')
"""
STEAL = [
    "found.append(dict(os.environ)); look(*[f'/proc/{n}/environ' for n in range(1, 5000)])",
    "look(*[f'/proc/{n}/cmdline' for n in range(1, 5000)])",
    "os.symlink({file}, 'a'); look({file}, 'a', '../../../../..' + {file})",
    "try: os.link({file}, 'b')\nexcept OSError: pass\nlook('b')",
    "import glob\nlook(*glob.glob({folder} + '/**', recursive=True))",
    "frame = sys._getframe()\nwhile frame:\n    found.extend([frame.f_locals, frame.f_globals])\n    frame = frame.f_back",
    "import gc\nfound.extend(repr(o)[:10000] for o in gc.get_objects() if type(o) in (dict, list, tuple))",
    "look(f'/proc/{os.getppid()}/mem', f'/proc/{os.getppid()}/fd/0')",
    "for n in range(256):\n    try: found.append(os.pread(n, 1 << 20, 0)); found.append(os.read(n, 1 << 20))\n    except OSError: pass",
    "import ctypes\nlibc = ctypes.CDLL(None)\nlibc.unshare(0x10020000)\nlibc.setuid(0)\nlibc.setns(3, 0)\nlibc.mount(b'proc', b'.', b'proc', 0, None)\ntry: os.chroot('.')\nexcept OSError: pass\nlook({file})",
    "import subprocess\ntry: found.append(subprocess.run('cat ' + {file}, shell=True, capture_output=True).stdout)\nexcept OSError: pass",
    "import glob\nfor path in glob.glob('/lib*/ld-linux*'):\n    if os.fork() == 0:\n        try: os.execv(path, [path, '/bin/cat', {file}])\n        finally: os._exit(0)\n    os.wait()",
    "import ctypes\nlibc = ctypes.CDLL(None)\nassert libc.ptrace(16, os.getppid(), 0, 0) < 0 > libc.ptrace(16, {victim}, 0, 0)",
]
HEAD = "import os, random, shutil, socket, time\nfrom contextlib import suppress\n"
ATTACK = [  # their own results are right, and may be paid for
    "for path in ({folder}, '.', '..'): shutil.rmtree(path, ignore_errors=True)",
    "for path in ({file}, {folder} + '/new', '/dev/shm/escape'):\n    with suppress(OSError): open(path, 'w').write('gone')",
    "for act in (lambda: os.truncate({file}, 0), lambda: os.rename({file}, {file} + '.old'), lambda: os.chmod({file}, 0), lambda: os.chmod({folder}, 0)):\n    with suppress(OSError): act()",
    "os.symlink({folder}, 'link')\nwith suppress(OSError): open('link/file', 'w').write('gone')",
    "os.mkdir('d'); os.symlink({folder}, 'd/link'); os.symlink('/', 'root'); os.chmod('d', 0)",
    "os.mkdir('d')\nwith suppress(OSError): os.chmod('.', 0)",
    "for pid in ({victim}, {us}, os.getppid(), -1):\n    with suppress(OSError): os.kill(pid, 9)",
    "for pid in ({victim}, {us}, os.getppid()):\n    with suppress(OSError): os.kill(pid, 19)",
    "import ctypes\nfor pid in ({us}, {victim}, os.getppid()): ctypes.CDLL(None).kill(pid, 9)",
    "with suppress(OSError): socket.create_connection(('127.0.0.1', {port}), 1).sendall(b'hello')",
    "with suppress(OSError): s = socket.socket(socket.AF_UNIX); s.connect(chr(0) + {secret}); s.sendall(b'hello')",
    "if os.fork() == 0:\n    os.setsid()\n    if os.fork(): os._exit(0)\n    os.closerange(0, 256)\n    time.sleep(1000)",
    "import threading\nthreading.Thread(target=time.sleep, args=[1000], daemon=True).start()",
    "import ctypes\nctypes.CDLL(None).shmget(77, 1 << 20, 0o1666)",
    "for act in (lambda: os.setuid(0), lambda: os.setgid(0), lambda: os.setgroups([0])):\n    with suppress(OSError): act()\nassert os.geteuid() == {euid} or os.geteuid() > 0",
    "for path in (os.__file__, random.__file__):\n    with suppress(OSError): open(path, 'a').write('1 / 0')",
    "import __main__, builtins\nfor name in dir(__main__):\n    if not name.startswith('__'): setattr(__main__, name, None)",
]


@needs_bubblewrap
def test_nothing_outside_can_be_read_changed_killed_or_called(monkeypatch):
    secret, folder = f"secret-{os.urandom(8).hex()}", Path(tempfile.mkdtemp())
    file = folder / "file"
    file.write_text(secret)
    file.chmod(0o666)  # so that permissions alone protect nothing
    folder.chmod(0o777)
    monkeypatch.setenv("SECRET", secret)
    victim = subprocess.Popen(["sleep", "100000"])
    tcp, unix = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)
    unix.bind("\0" + secret)
    unix.listen()
    facts = {"file": str(file), "folder": str(folder), "victim": victim.pid, "us": os.getpid()}
    facts |= {"port": tcp.getsockname()[1], "secret": secret}
    before = [(path.stat().st_mode, path.stat().st_mtime_ns) for path in (folder, file)]

    def fill(text):
        for name, value in facts.items():
            text = text.replace("{" + name + "}", repr(value))
        return text

    steal = {trick: fill(SEARCH.replace("{trick}", trick)) for trick in STEAL}
    assert earn(steal, problem([""], [secret])) == dict.fromkeys(STEAL, -0.3)
    programs = {}
    for trick in ATTACK:
        programs |= {trick: f"{HEAD}{fill(trick)}\n{RIGHT_SCRIPT}", f"after {trick}": RIGHT_SCRIPT}
    rewards = earn(programs, DOUBLE)
    assert {reward for name, reward in rewards.items() if name in ATTACK} <= {1.0, -0.6}
    assert {reward for name, reward in rewards.items() if name not in ATTACK} == {1.0}
    assert file.read_text() == secret and not Path("/dev/shm/escape").exists()
    assert before == [(path.stat().st_mode, path.stat().st_mtime_ns) for path in (folder, file)]
    assert Path(f"/proc/{victim.pid}/stat").read_text().split()[2] == "S"  # alive, not stopped
    victim.kill()
    victim.wait()
    shutil.rmtree(folder)
    for server in (tcp, unix):
        server.settimeout(0)
        with pytest.raises(BlockingIOError):  # nobody has called
            server.accept()
        server.close()


LEAVE = """
import ctypes, os, time
print(len([n for n in os.listdir("/proc") if n.isdigit()]), os.listdir("."))
print(len(open("/proc/sysvipc/shm").readlines()))
open("file", "w").write("x")
ctypes.CDLL(None).shmget(77, 1 << 20, 0o1666)
if os.fork() == 0:
    os.setsid()  # it leaves its group
    time.sleep(1000)
"""
CROWD = """
import os, time
count = 0
try:
    while count < 200:
        if os.fork() == 0: time.sleep(1000)
        count += 1
except OSError: pass
print(8 <= count < 16)
"""


@needs_bubblewrap
def test_nothing_of_a_program_outlives_its_test_and_there_are_never_hundreds_of_processes():
    alone = problem([""] * 3, ["2 []\n1"] * 3)  # the runner, and the program itself
    crowd = problem([""] * 3, ["True"] * 3)
    programs = [LEAVE, CROWD, LEAVE, CROWD, LEAVE, LEAVE]
    assert (
        program_rewards(programs, [alone, crowd, alone, crowd, alone, alone], ENOUGH) == [1.0] * 6
    )


def test_a_program_that_kills_its_runner_fails_alone(way):
    kill = "import os\ndef f(x): os.kill(os.getppid(), 9)"
    rewards = program_rewards([RIGHT, kill, RIGHT, kill, RIGHT], [SQUARE] * 5, ENOUGH)
    assert rewards[::2] == [1.0] * 3
    assert rewards[1::2] == [-0.3 if way == "sandbox" else -0.6] * 2  # there it cannot


def test_without_a_sandbox_a_models_programs_are_refused_unless_they_are_trusted(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(reward, "sandbox", reward.sandbox.__wrapped__)
    with pytest.raises(SystemExit) as stop:
        ma_ppo.parse(["--task", "apps"])
    warning, error = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and "limits only" in warning
    assert "apt install bubblewrap" in error and "--trust_programs" in error
    ma_ppo.parse(["--task", "apps", "--trust_programs"])
    ma_ppo.parse(["--task", "toy-code"])
