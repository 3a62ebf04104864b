"""Chapter 2, unit tests as a reward: right programs earn what SPEC 7 says, hostile ones gain and harm nothing."""

# ruff: noqa: E501  (hostile programs are easier to read in a line of their own)
import contextlib
import inspect
import os
import random
import socket
import stat
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest

import reward
from reward import program_rewards, run_programs

TIMEOUT = 1.0
SECRET = f"secret-{random.SystemRandom().getrandbits(64)}"  # no program can guess it, only get at it
PLACE = "/dev/shm/sandbox-test-escape"
linux = pytest.mark.skipif(sys.platform != "linux", reason="namespaces and Landlock are Linux's")


def call(*tests, name="f"):
    """A call-based problem with (arguments, result) tests."""
    inputs, outputs = [list(given) for given, _ in tests], [result for _, result in tests]
    return {"input_output": {"fn_name": name, "inputs": inputs, "outputs": outputs}}


def stdio(*tests):
    """A problem on standard input and output with (input, output) tests."""
    return {"input_output": {"inputs": [given for given, _ in tests], "outputs": [said for _, said in tests]}}


SQUARE = call(([3], 9), ([5], 25), ([7], 49))
DOUBLE = stdio(("3", "6"), ("5\n", "10\n"), ("7", ["14"]))
RIGHT, RIGHT_SCRIPT = "def f(x): return x * x", "print(2 * int(input()))"


def one(program, problem, timeout=TIMEOUT):
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
    assert program_rewards(programs, [SQUARE] * 6, TIMEOUT) == pytest.approx(wanted, abs=1e-12)


def test_one_test_that_raises_or_is_late_makes_the_program_a_runtime_error():
    raises = "def f(x): return 1 // (7 - x) * 0 + x * x"
    late = "def f(x):\n    while x == 7: pass\n    return x * x"
    results = run_programs([raises, late, RIGHT], [SQUARE] * 3, TIMEOUT)
    assert results == [("runtime error", 2, 3), ("time-out", 2, 3), ("ran", 3, 3)]
    assert [one(raises, SQUARE), one(late, SQUARE)] == [-0.6, -0.6]


def test_the_timeout_is_per_test_and_kept():
    began = time.monotonic()
    slow = "import time\ndef f(x): time.sleep(0.4); return x * x"
    assert one(slow, SQUARE) == 1.0  # 1.2 s in all
    began = time.monotonic()
    assert one("while True: pass", DOUBLE, timeout=0.5) == -0.6
    assert 0.5 <= time.monotonic() - began < 2.5


def test_scripts_talk_through_standard_input_and_output():
    assert one(RIGHT_SCRIPT, DOUBLE) == 1.0
    lines = stdio((["2", "1 2", "3 4"], ["3", "7"]))
    for read in ("sys.stdin.readline()", "input()", "sys.stdin.buffer.readline()", "next(sys.stdin)"):
        program = f"import sys\nfor _ in range(int({read})):\n    print(sum(map(int, {read}.split())))"
        assert one(program, lines) == 1.0, read
    assert one("print(*[eval(x.replace(' ', '+')) for x in open(0).read().split('\\n')[1:]])", lines) == -0.3
    assert one("print('é', input())", stdio(("ü", "é ü"))) == 1.0


def test_only_trailing_white_space_is_forgiven():
    problem = stdio(("", "a b\n\nc\n"))
    assert one("print('a b  \\n\\nc\\n\\n \\n', end='')", problem) == 1.0
    assert [one(f"print({text!r})", problem) for text in ("a b\nc", " a b\n\nc", "a  b\n\nc")] == [-0.3] * 3


def test_a_script_ends_as_python_would_end_it():
    said = stdio(("", "end"))
    for program in (
        "import sys; print('end'); sys.exit()",
        "print('end'); quit(0)",
        "import os, sys; print('end'); sys.stdout.flush(); os._exit(0)",
        "import threading, time\nthreading.Thread(target=lambda: (time.sleep(0.1), print('end'))).start()",
        "import atexit, io, sys\nsys.stdout = io.StringIO()\n"
        "atexit.register(lambda: sys.__stdout__.write(sys.stdout.getvalue()))\nprint('end')",
        "file = open(1, 'w', closefd=False)\nfile.write('end')",
        "if __name__ == '__main__': print('end')",
        "def main():\n    print('end')\nmain()",
    ):
        assert one(program, said) == 1.0, program
    for program in ("print('end'); exit(1)", "print('end'); raise SystemExit('no')", "print('end'); 1 / 0"):
        assert one(program, said) == -0.6, program


def test_functions_and_solution_classes_are_called():
    method = "class Solution:\n    def f(self, xs: List[int]) -> Optional[int]:\n        return max(xs)"
    assert one(method, call(([[1, 3, 2]], 3))) == 1.0
    assert one("f = lambda *a, b=1: [*a, b]\nprint('noise')", call(([5, 6], [5, 6, 1]))) == 1.0
    assert one("if __name__ == '__main__': 1 / 0\ndef f(): return deque([1]).pop()", call(([], 1))) == 1.0
    assert one("def g(x): return x * x", SQUARE) == -0.6


def test_results_are_compared_as_plain_data():
    assert one("def f(): return (1, (2, 'ä')), {3: None}", call(([], [[1, [2, "ä"]], {"3": None}]))) == 1.0
    assert one("def f(): return 2", call(([], [2]))) == 1.0  # APPS wraps some results
    assert one("def f(): return [2]", call(([], [2]))) == 1.0
    assert one("def f(): return 1", call(([], [1, 2]))) == -0.3
    assert one("def f(): return '2'", call(([], 2))) == -0.3


def test_the_schema_is_apps_with_json_text_and_dicts():
    import json

    problem = {"input_output": json.dumps(SQUARE["input_output"]), "question": "…"}
    assert one(RIGHT, problem) == 1.0
    empty = {"input_output": {"inputs": [], "outputs": []}}
    with pytest.raises(ValueError, match="no unit tests"):
        program_rewards([RIGHT, RIGHT], [problem, empty], TIMEOUT)
    with pytest.raises(ValueError):
        program_rewards([RIGHT], [problem, problem], TIMEOUT)
    assert program_rewards([], []) == []


def test_rewards_do_not_depend_on_order_or_company():
    programs = [RIGHT, "def f(x): return 9", "def f(x): f.n = 1 / 0", "f(", RIGHT_SCRIPT] * 3
    programs += ["import sys; sys.modules.clear()", "import random\ndef f(x): return random.random()"]
    programs += ["def f(x): return sorted({'a', 'b', 'c', 'd'}) and ''.join({'a', 'b', 'c', 'd', 'e'})"]
    alone = {program: one(program, SQUARE) for program in set(programs)}
    for seed in range(3):
        random.Random(seed).shuffle(programs)
        rewards = program_rewards(programs, [SQUARE] * len(programs), TIMEOUT)
        assert rewards == [alone[program] for program in programs]


def test_unseeded_randomness_and_set_order_are_reproducible():
    program = "import random\nprint(random.random(), list({'a', 'b', 'c', 'd'}), hash('x'))"
    first = run_and_read(program)
    assert first and all(run_and_read(program) == first for _ in range(4))


def run_and_read(program):
    """What a script prints."""
    job = {"program": program, "function": None, "input": "", "timeout": TIMEOUT}
    return reward._threads(os.getpid()).submit(reward._server.run, job).result()[1]


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
    "rm -rf of its parents": "for path in ('.', '..', '/', {folder!r}): shutil.rmtree(path, ignore_errors=True)",
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


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Run all hostile programs in one call, each followed by a right one; return what happened."""
    folder = Path(tempfile.mkdtemp(prefix="sandbox-test-"))
    file = folder / "file"
    file.write_text(SECRET)
    folder.chmod(0o777), file.chmod(0o666)  # so that permissions alone protect nothing
    old = os.environ.get("SANDBOX_TEST")
    os.environ["SANDBOX_TEST"] = SECRET
    victim = subprocess.Popen(["sleep", "1000"], env={"SANDBOX_TEST": SECRET})
    tcp, udp = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    abstract = socket.socket(socket.AF_UNIX)
    udp.bind(("127.0.0.1", 0))
    if sys.platform == "linux":
        abstract.bind("\0" + SECRET), abstract.listen()
    facts = {
        "file": str(file),
        "folder": str(folder),
        "victim": victim.pid,
        "us": os.getpid(),
        "euid": os.geteuid(),
    }
    facts |= {"port": tcp.getsockname()[1], "udp": udp.getsockname()[1], "unix": SECRET, "place": PLACE}

    def fill(text):
        for name, value in facts.items():
            text = text.replace(f"{{{name}!r}}", repr(value)).replace(f"{{{name}}}", str(value))
        return text

    cases = {
        name: (program, SQUARE) for part in (NAUGHTY, WRONG, BROKEN, BOMBS) for name, program in part.items()
    }
    secret = stdio(("", SECRET))
    cases |= {name: (SEARCH.replace("{}", fill(text)), secret) for name, text in STEAL.items()}
    cases |= {
        name: (HEAD + fill(text) + "\n" + "print(2 * int(input()))", DOUBLE) for name, text in ATTACK.items()
    }
    before, programs, problems = snapshot(folder), [], []
    for program, problem in cases.values():
        programs += [program, RIGHT]
        problems += [problem, SQUARE]
    results = run_programs(programs, problems, TIMEOUT)
    seen = {
        "results": dict(zip(cases, results[::2], strict=True)),
        "next": dict(zip(cases, results[1::2], strict=True)),
    }
    seen |= {"unchanged": snapshot(folder) == before, "victim": victim.poll() is None and state(victim.pid)}
    for name, server in (("tcp", tcp), ("udp", udp), ("unix", abstract)):
        server.settimeout(0)
        with contextlib.suppress(OSError):
            seen[name] = server.recv(99) if name == "udp" else server.accept()
        server.close()
    victim.kill(), victim.wait()
    yield seen
    os.environ.pop("SANDBOX_TEST") if old is None else os.environ.update(SANDBOX_TEST=old)
    folder.chmod(0o700), file.unlink(), folder.rmdir()


def snapshot(folder):
    """Names, modes, times and contents of a folder."""
    found = {}
    for path in (folder, *sorted(folder.rglob("*"))):
        about = path.stat()
        content = path.read_bytes() if path.is_file() else b""
        found[str(path)] = stat.S_IMODE(about.st_mode), about.st_mtime_ns, content
    return found


def state(pid):
    """R, S, T, Z, … of a process."""
    path = Path(f"/proc/{pid}/stat")
    return path.read_text().rsplit(")", 1)[1].split()[0] if path.exists() else "S"


@pytest.mark.parametrize("name", NAUGHTY)
def test_a_program_that_breaks_the_rules_is_a_runtime_error(world, name):
    status, _, _ = world["results"][name]
    assert status in ("runtime error", "time-out")


@pytest.mark.parametrize("name", WRONG)
def test_a_result_that_is_not_the_expected_data_passes_no_test(world, name):
    assert world["results"][name] == ("ran", 0, 3)


@pytest.mark.parametrize("name", BROKEN)
def test_source_that_cannot_be_compiled_is_a_compile_error(world, name):
    assert world["results"][name] == ("compile error", 0, 3)


@pytest.mark.parametrize("name", BOMBS)
def test_source_that_takes_forever_or_all_memory_is_ended(world, name):
    assert world["results"][name][0] in ("runtime error", "time-out")


@linux
@pytest.mark.parametrize("name", STEAL)
def test_the_expected_output_cannot_be_stolen(world, name):
    status, passed, _ = world["results"][name]
    assert passed == 0
    assert status == "ran" or name == "memory of the keeper", (
        "the program itself is at fault: it proves nothing"
    )


@pytest.mark.parametrize("name", ATTACK)
def test_an_attack_on_the_outside_earns_at_most_what_is_right(world, name):
    assert world["results"][name] in [("ran", 3, 3), ("runtime error", 0, 3), ("time-out", 0, 3)]


@pytest.mark.parametrize("name", [*NAUGHTY, *WRONG, *BROKEN, *BOMBS, *STEAL, *ATTACK])
def test_the_next_program_is_judged_rightly(world, name):
    assert world["next"][name] == ("ran", 3, 3)


@linux
def test_nothing_outside_has_changed(world):
    assert world["unchanged"] and not Path(PLACE).exists()
    assert world["victim"] == "S"  # alive, and not stopped
    assert state(os.getpid()) != "T"
    assert not {"tcp", "udp", "unix"} & set(world), "something has come through a socket"


@linux
def test_no_process_outlives_its_program(world):
    assert leftovers() == []


def leftovers():
    """Processes that fork from servers and are neither servers nor keepers: those are in a server's session."""
    time.sleep(0.2)
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            pid = int(path.name)
            if b"_Sandbox().serve()" in (path / "cmdline").read_bytes() and state(pid) != "Z":
                session = os.getsid(pid)
                server = Path(f"/proc/{session}/cmdline")
                if not server.exists() or (session != pid and parent(pid) != session):
                    found.append(pid)
    return found


def parent(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


# The servers


def test_a_server_that_dies_is_replaced():
    pids = {
        reward._threads(os.getpid()).submit(lambda: reward._server.process.pid).result() for _ in range(1)
    }
    for pid in pids:
        os.killpg(pid, 9)
    time.sleep(0.1)
    program_rewards([RIGHT] * 4, [SQUARE] * 4, TIMEOUT)  # the one that finds it dead is lost
    assert program_rewards([RIGHT] * 4, [SQUARE] * 4, TIMEOUT) == [1.0] * 4


def test_processes_and_folders_end_with_the_interpreter(tmp_path):
    program = textwrap.dedent("""
        import os, reward
        problem = {"input_output": {"fn_name": "f", "inputs": [[1]], "outputs": [1]}}
        assert reward.program_rewards(["def f(x): return x"] * 4, [problem] * 4) == [1.0] * 4
        print(reward._threads(os.getpid()).submit(lambda: reward._server.process.pid).result())
    """)
    environment = {
        **os.environ,
        "TMPDIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join([str(Path(reward.__file__).parent), *filter(None, sys.path)]),
    }
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)


def test_without_namespaces_and_landlock_it_warns_once_and_still_ends_programs(monkeypatch, capfd):
    source = inspect.getsource(reward._Sandbox)
    bare = source.replace("self.linux and self.enter_namespaces()", "False").replace(
        "self.landlock = self.linux and", "self.landlock = 0 and"
    )
    assert bare.count("\n") == source.count("\n") and bare != source
    monkeypatch.setattr(reward.inspect, "getsource", lambda part: bare)
    monkeypatch.setattr(reward, "_server", reward._Server())
    reward._print_once.cache_clear()
    names = [
        "infinite loop",
        "fork bomb",
        "os._exit before the tests",
        "daemon that keeps the pipe",
        "1 GB file",
    ]
    programs = [RIGHT, RIGHT_SCRIPT, *[NAUGHTY[name] for name in names], WRONG["always equal"], RIGHT]
    # Without namespaces, the limit on processes counts all of a user's: only root's substitute can fork.
    daemon = "import os, time\n" + ATTACK["leaves a daemon"] + "\n" if os.geteuid() == 0 else ""
    programs += [daemon + RIGHT_SCRIPT, RIGHT]
    problems = [SQUARE, DOUBLE, *[SQUARE] * (len(names) + 2), DOUBLE, SQUARE]
    rewards = program_rewards(programs, problems, TIMEOUT)
    assert rewards == [1.0, 1.0, *[-0.6] * len(names), -0.3, 1.0, 1.0, 1.0]
    assert capfd.readouterr().err.count("namespaces and landlock") == 1
    if sys.platform == "linux":
        assert leftovers() == []
