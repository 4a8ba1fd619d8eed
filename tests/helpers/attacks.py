"""Attempts of a program to leave its isolation, as data.

All are bounded, and aimed at processes, files and sockets made by the test itself. ``T`` holds
them: ``victim`` (a process), ``driver`` (the caller of the sandbox), ``file``, ``folder``,
``scratch`` (an open folder beside them), ``unix``, ``unix_dgram``, ``abstract``, ``tcp``, ``udp``,
``udp6`` and ``name`` (for what an attempt makes outside).
"""

from __future__ import annotations

from dataclasses import dataclass

PRELUDE = """
import ctypes, errno, fcntl, json, os, resource, signal, socket, struct, sys, threading, time

T = json.loads(sys.stdin.readline())
PARENT, VICTIM, FILE, FOLDER = os.getppid(), T["victim"], T["file"], T["folder"]
LOOPBACK = ("127.0.0.1", T["tcp"])
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
_passed = []
_refusals = []


def call(number, *arguments):
    sent = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    value = libc.syscall(ctypes.c_long(number), *sent)
    if value == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return value


def attempt(function, *arguments, **named):
    try:
        value = function(*arguments, **named)
    except OSError as error:
        _refusals.append(errno.errorcode.get(error.errno, type(error).__name__))
    except (ValueError, OverflowError, RuntimeError, MemoryError) as error:
        _refusals.append(type(error).__name__)
    else:
        _passed.append(getattr(function, "__name__", "?") + repr(arguments)[:90])
        return value


def path_of(name):
    try:
        return os.open(name, os.O_PATH)
    except OSError:  # not in this file system
        print("refused ENOENT", flush=True)
        os._exit(0)


def report():
    if _passed:
        print("passed", *_passed)
    elif _refusals:
        print("refused", *sorted(set(_refusals)))
    else:
        print("harmless")
    sys.stdout.flush()


def owned_by(pid, file, how=fcntl.F_SETOWN):
    fcntl.fcntl(file, how, pid)
    fcntl.fcntl(file, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(file, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)


"""


@dataclass(frozen=True)
class Attack:
    """An attempt, and its end.

    Args:
        name: a sentence about the attempt.
        kind: its row in the table of the threat model.
        code: of the program, after ``PRELUDE``.
        ends: allowed outcomes: ``refused`` each attempt raises; ``harmless`` nothing is claimed;
            ``passed`` a call works, on the program's own things; or ``exit N``, ``timeout``.
        says: text that standard error must have.
        x86_64_only: the code has numbers of system calls.
    """

    name: str
    kind: str
    code: str
    ends: tuple[str, ...] = ("refused",)
    says: str = ""

    @property
    def seconds(self) -> float:
        """Time limit: long enough for a busy machine, but short where it is to be reached."""
        return 1.0 if "timeout" in self.ends else 20.0

    @property
    def x86_64_only(self) -> bool:
        return "call(" in self.code

    @property
    def program(self) -> str:
        return f"{PRELUDE}\n{self.code.strip()}\nreport()\n"


ATTACKS: tuple[Attack, ...] = (
    # contents of files
    Attack(
        "reads a file",
        "file contents",
        """
attempt(open, FILE)
attempt(os.open, FILE, os.O_RDONLY | os.O_NONBLOCK)
attempt(os.listdir, FOLDER)
attempt(os.listdir, f"{FOLDER}/../{os.path.basename(FOLDER)}")
attempt(os.open, "/etc/passwd", os.O_RDONLY)
attempt(os.listdir, "/proc")
attempt(os.listdir, "/sys")
attempt(os.listdir, "/dev")
""",
    ),
    Attack(
        "opens a file for writing",
        "file contents",
        """
for flags in (os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_APPEND, os.O_WRONLY | os.O_TRUNC):
    attempt(os.open, FILE, flags)
attempt(os.open, f"{FOLDER}/new", os.O_CREAT | os.O_WRONLY)
attempt(os.open, FOLDER, os.O_TMPFILE | os.O_WRONLY)
attempt(os.open, "/dev/shm/" + T["name"], os.O_CREAT | os.O_WRONLY)
attempt(os.open, "/tmp/" + T["name"], os.O_CREAT | os.O_WRONLY)
""",
    ),
    Attack(
        "cuts, moves and removes files",
        "file contents",
        """
attempt(os.truncate, FILE, 0)
attempt(os.rename, FILE, FILE + "2")
attempt(os.rename, FILE, "mine")
attempt(os.rename, "main.py", FILE)
attempt(os.replace, "main.py", f"{FOLDER}/new")
attempt(os.unlink, FILE)
attempt(os.rmdir, FOLDER)
attempt(os.mkdir, f"{FOLDER}/new")
attempt(os.mkfifo, f"{FOLDER}/fifo")
attempt(os.symlink, "/", f"{FOLDER}/link")
""",
    ),
    Attack(
        "exchanges a file for its own",
        "file contents",
        'attempt(call, 316, -100, FILE.encode(), -100, b"main.py", 2)',
    ),
    Attack(
        "links a file into its folder",
        "file contents",
        """
attempt(os.link, FILE, "hard")
attempt(os.link, "main.py", f"{FOLDER}/hard")
os.symlink(FILE, "soft")
attempt(open, "soft")
attempt(open, "soft", "a")
attempt(os.truncate, "soft", 0)
""",
    ),
    Attack(
        "opens a file by a path descriptor",
        "file contents",
        """
folder = path_of(FOLDER)
attempt(os.open, os.path.basename(FILE), os.O_RDONLY, dir_fd=folder)
attempt(os.open, os.path.basename(FILE), os.O_WRONLY, dir_fd=folder)
attempt(os.unlink, os.path.basename(FILE), dir_fd=folder)
path = path_of(FILE)
attempt(open, f"/proc/self/fd/{path}")
attempt(os.read, path, 1)
attempt(os.open, "", os.O_RDONLY, dir_fd=path)
""",
    ),
    Attack(
        "opens a file by its handle",
        "file contents",
        """
handle = ctypes.create_string_buffer(136)
struct.pack_into("I", handle, 0, 128)
mount = ctypes.c_int()
folder = path_of(FOLDER)
attempt(lambda: call(304, folder, handle, 0)
        if call(303, -100, FILE.encode(), handle, ctypes.byref(mount), 0) == 0 else None)
""",
    ),
    Attack(
        "changes the link while the file is judged",
        "file contents",
        """
os.mkdir("d")
open("d/own", "w").close()
stop = time.monotonic() + 0.3

def flip():
    while time.monotonic() < stop:
        for target in ("d/own", FILE):
            os.symlink(target, "next")
            os.replace("next", "flip")

threading.Thread(target=flip).start()
while time.monotonic() < stop:
    try:
        if os.path.samestat(os.fstat(os.open("flip", os.O_RDWR)), os.stat(FILE)):
            attempt(str, "opened the file")
            break
    except OSError:
        pass
""",
        ("harmless",),
    ),
    Attack(
        "stat of a file",
        "file names",
        "attempt(os.stat, FOLDER)\nattempt(os.lstat, FILE)",
        ("passed", "refused"),
    ),
    # attributes of files
    Attack(
        "changes the mode of a file",
        "file attributes",
        """
folder = path_of(FOLDER)
attempt(os.chmod, FILE, 0o777)
attempt(os.chmod, FOLDER, 0o777)
attempt(os.chmod, os.path.basename(FILE), 0o777, dir_fd=folder)
attempt(call, 90, FILE.encode(), 0o777)
attempt(call, 91, folder, 0o777)
attempt(call, 452, -100, FILE.encode(), 0o777, 0)
attempt(call, 452, folder, b"", 0o777, 0x1000)
os.symlink(FILE, "soft")
attempt(os.chmod, "soft", 0o777)
""",
    ),
    Attack(
        "changes the owner of a file",
        "file attributes",
        """
folder = path_of(FOLDER)
attempt(os.chown, FILE, os.getuid(), os.getgid())
attempt(os.lchown, FILE, 1234, 1234)
attempt(os.chown, FOLDER, 1234, 1234)
attempt(call, 92, FILE.encode(), 1234, 1234)
attempt(call, 260, folder, b"", 1234, 1234, 0x1000)
""",
    ),
    Attack(
        "changes the times of a file",
        "file attributes",
        """
attempt(os.utime, FILE, (1, 1))
attempt(os.utime, FOLDER, (1, 1), follow_symlinks=False)
attempt(call, 132, FILE.encode(), None)
attempt(call, 235, FILE.encode(), None)
attempt(call, 261, -100, FILE.encode(), None)
attempt(call, 280, -100, FILE.encode(), None, 0)
""",
    ),
    Attack(
        "changes extended attributes",
        "file attributes",
        """
attempt(os.setxattr, FILE, "user.mark", b"x")
attempt(os.setxattr, FOLDER, "user.mark", b"x")
attempt(os.setxattr, FILE, "security.capability", bytes(20))
attempt(os.removexattr, FILE, "user.kept")
attempt(call, 463, -100, FILE.encode(), 0, b"user.mark", bytes(16), 16)
attempt(call, 466, -100, FILE.encode(), 0, b"user.kept")
""",
    ),
    Attack(
        "changes the flags of a file",
        "file attributes",
        """
flags = struct.pack("QIIII", 0x80, 0, 0, 0, 0)  # no dump
attempt(call, 469, -100, FILE.encode(), flags, 24, 0)
attempt(call, 469, -100, FOLDER.encode(), flags, 24, 0)
""",
    ),
    Attack(
        "locks its files against removal",
        "disk",
        """
os.mkdir("kept")
file = os.open("kept/file", os.O_CREAT | os.O_RDWR)
for target in (file, os.open("kept", os.O_RDONLY)):
    try:
        fcntl.ioctl(target, 0x40086602, struct.pack("L", 0x30))  # immutable, append only
    except OSError:
        pass
""",
        ("harmless",),
    ),
    # processes
    Attack(
        "reads the memory and environment of a process",
        "process data",
        """
for pid in (PARENT, VICTIM, T["driver"]):
    for name in ("environ", "mem", "maps", "cmdline", "status", "fd/0", "root/etc", "cwd", "auxv"):
        attempt(os.open, f"/proc/{pid}/{name}", os.O_RDONLY)
    attempt(os.listdir, f"/proc/{pid}/fd")
    if pid != PARENT:  # the parent answers for itself
        attempt(os.readlink, f"/proc/{pid}/fd/0")
        attempt(os.readlink, f"/proc/{pid}/cwd")
    attempt(os.open, f"/proc/{pid}/task/{pid}/environ", os.O_RDONLY)
""",
    ),
    Attack(
        "writes to the files of a process",
        "process data",
        """
for pid in (PARENT, VICTIM, T["driver"]):
    for name in ("mem", "oom_score_adj", "comm", "clear_refs", "coredump_filter", "timerslack_ns"):
        attempt(os.open, f"/proc/{pid}/{name}", os.O_WRONLY)
""",
    ),
    Attack(
        "traces a process",
        "process data",
        """
for pid in (PARENT, VICTIM, T["driver"]):
    attempt(call, 101, 16, pid, 0, 0)  # attach
    attempt(call, 101, 0x4206, pid, 0, 0)  # seize
attempt(call, 101, 0, 0, 0, 0)  # be traced by the parent
""",
    ),
    Attack(
        "writes into the memory of a process",
        "process data",
        """
buffer = ctypes.create_string_buffer(16)
part = struct.pack("PN", ctypes.addressof(buffer), 16)
for pid in (PARENT, VICTIM, T["driver"]):
    attempt(call, 310, pid, part, 1, part, 1, 0)
    attempt(call, 311, pid, part, 1, part, 1, 0)
""",
    ),
    Attack(
        "compares and takes descriptors of a process",
        "process data",
        """
for pid in (PARENT, VICTIM):
    attempt(call, 312, os.getpid(), pid, 0, 0, 0)
    attempt(call, 434, pid, 0)
    attempt(lambda: call(438, call(434, pid, 0), 0, 0))
""",
    ),
    # signals
    Attack(
        "kills a process",
        "signals",
        """
for pid in (PARENT, VICTIM, T["driver"]):
    attempt(os.kill, pid, signal.SIGKILL)
    attempt(os.kill, pid, signal.SIGSTOP)
    attempt(os.kill, pid, 0)
""",
    ),
    Attack(
        "kills a process group",
        "signals",
        """
attempt(os.killpg, T["victim_group"], signal.SIGKILL)
attempt(os.kill, -T["victim_group"], signal.SIGKILL)
""",
    ),
    Attack("kills its own group", "signals", "os.kill(0, 9)", ("exit -9", "refused", "exit 1")),
    Attack(
        "signals every process",
        "signals",
        "attempt(os.kill, -1, 0)\nattempt(os.kill, -1, signal.SIGURG)",
        ("refused", "passed"),  # the kernel says success where it was refused for each process
    ),
    Attack(
        "kills a thread",
        "signals",
        """
for pid in (PARENT, VICTIM, T["driver"]):
    attempt(call, 200, pid, 9)
    attempt(call, 234, pid, pid, 9)
""",
    ),
    Attack(
        "queues a signal",
        "signals",
        """
for pid in (PARENT, VICTIM, T["driver"]):
    for code in (-1, -6, 0):
        information = struct.pack("iiiiii", 9, 0, code, 0, os.getpid(), os.getuid()) + bytes(104)
        attempt(call, 129, pid, 9, information)
        attempt(call, 297, pid, pid, 9, information)
""",
    ),
    Attack(
        "kills by a process descriptor",
        "signals",
        """
for pid in (PARENT, VICTIM, T["driver"]):
    attempt(lambda: call(424, call(434, pid, 0), 9, None, 0))
    attempt(lambda: call(424, os.open(f"/proc/{pid}", os.O_PATH), 9, None, 0))
    attempt(lambda: call(448, call(434, pid, 0), 0))
""",
    ),
    Attack(
        "makes a process the owner of a pipe",
        "signals",
        """
for pid in (PARENT, VICTIM, T["driver"], -T["victim_group"]):
    reader, writer = os.pipe()
    try:
        owned_by(pid, reader)
    except OSError:
        continue
    os.write(writer, b"x")
    os.close(writer)
""",
        ("harmless",),
    ),
    Attack(
        "makes a process the owner of its standard streams",
        "signals",
        """
for pid in (PARENT, VICTIM, T["driver"]):
    for file in (0, 1, 2):
        try:
            owned_by(pid, file)
            os.write(file, b"x") if file == 2 else None
        except OSError:
            continue
""",
        ("harmless",),
    ),
    Attack(
        "makes a process the owner of a socket",
        "signals",
        """
for pid in (PARENT, VICTIM, T["driver"]):
    for order in (0x8901, 0x8902):  # FIOSETOWN, SIOCSPGRP
        try:
            one, two = socket.socketpair()
            fcntl.ioctl(one, order, struct.pack("i", pid))
            fcntl.fcntl(one, fcntl.F_SETSIG, 9)
            fcntl.ioctl(one, 0x5452, struct.pack("i", 1))  # FIOASYNC
            two.send(b"x")
            two.send(b"x", socket.MSG_OOB)
        except OSError:
            continue
    try:
        one, two = socket.socketpair()
        fcntl.fcntl(one, 15, struct.pack("ii", 1, pid))  # F_SETOWN_EX
        owned_by(pid, one)
        two.send(b"x")
    except OSError:
        continue
""",
        ("harmless",),
    ),
    Attack(
        "breaks a lease owned by a process",
        "signals",
        """
for pid in (PARENT, VICTIM, T["driver"]):
    try:
        file = os.open("leased", os.O_CREAT | os.O_RDONLY)
        fcntl.fcntl(file, fcntl.F_SETOWN, pid)
        fcntl.fcntl(file, fcntl.F_SETSIG, 9)
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(file, fcntl.F_SETOWN, pid)
        os.close(os.open("leased", os.O_WRONLY | os.O_NONBLOCK))
    except OSError:
        pass
    finally:
        os.close(file)
""",
        ("harmless",),
    ),
    Attack(
        "has a process told of changes in a folder",
        "signals",
        """
for pid in (PARENT, VICTIM, T["driver"]):
    try:
        folder = os.open(".", os.O_RDONLY)
        fcntl.fcntl(folder, fcntl.F_SETSIG, 9)
        fcntl.fcntl(folder, fcntl.F_SETOWN, pid)
        fcntl.fcntl(folder, fcntl.F_NOTIFY, fcntl.DN_CREATE | fcntl.DN_MULTISHOT)
        fcntl.fcntl(folder, fcntl.F_SETOWN, pid)
        open(f"made{pid}", "w").close()
    except OSError:
        continue
""",
        ("harmless",),
    ),
    Attack(
        "sets a timer that signals a process",
        "signals",
        """
for pid in (PARENT, VICTIM, T["driver"]):
    event = struct.pack("Piii", 0, 9, 4, pid) + bytes(44)  # SIGEV_THREAD_ID
    attempt(call, 222, 1, event, ctypes.byref(ctypes.c_int()))
""",
    ),
    Attack(
        "dies with a signal for its parent",
        "signals",
        """
for number in (0x8000 | 9, 9, 0x100 | 9):  # CLONE_PARENT, and signals at the end of the child
    try:
        if call(56, number, 0, 0, 0, 0) == 0:
            os._exit(0)
    except OSError:
        continue
for option in (1, 36, 59):  # PDEATHSIG, CHILD_SUBREAPER, and others on itself
    libc.prctl(option, 9, 0, 0, 0)
""",
        ("harmless", "exit -9"),
    ),
    # scheduling, priorities and limits
    Attack(
        "changes the priority of a process",
        "scheduling",
        """
for pid in (PARENT, VICTIM, T["driver"]):
    attempt(os.setpriority, os.PRIO_PROCESS, pid, 19)
    attempt(os.setpriority, os.PRIO_PGRP, T["victim_group"], 19)
    attempt(call, 251, 1, pid, 3 << 13)  # ioprio_set: idle
attempt(os.setpriority, os.PRIO_USER, os.getuid(), 19)
attempt(call, 251, 3, os.getuid(), 3 << 13)
""",
    ),
    Attack(
        "changes the scheduling of a process",
        "scheduling",
        """
for pid in (PARENT, VICTIM, T["driver"]):
    attempt(os.sched_setaffinity, pid, {0})
    attempt(os.sched_setscheduler, pid, os.SCHED_IDLE, os.sched_param(0))
    attempt(os.sched_setparam, pid, os.sched_param(0))
    attempt(call, 314, pid, struct.pack("IIQiIQQQ", 48, 5, 0, 0, 0, 0, 0, 0), 0)
""",
    ),
    Attack(
        "changes the limits of a process",
        "scheduling",
        """
for pid in (PARENT, VICTIM, T["driver"]):
    attempt(resource.prlimit, pid, resource.RLIMIT_NOFILE, (8, 8))
    attempt(resource.prlimit, pid, resource.RLIMIT_CPU, (0, 0))
    attempt(call, 256, pid, 8, bytes(8), bytes(8))  # migrate_pages
    attempt(call, 279, pid, 0, None, None, None, 0)  # move_pages
""",
    ),
    Attack(
        "raises its own limits",
        "scheduling",
        """
unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
for limit in (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_FSIZE):
    attempt(resource.setrlimit, limit, unlimited)
    attempt(resource.prlimit, os.getpid(), limit, unlimited)
attempt(os.nice, -5)
""",
    ),
    # sockets
    Attack(
        "connects to a local server",
        "network",
        """
for kind, address in (
    (socket.SOCK_STREAM, T["unix"]),
    (socket.SOCK_STREAM, "\\0" + T["abstract"]),
    (socket.SOCK_DGRAM, T["unix_dgram"]),
):
    attempt(lambda: socket.socket(socket.AF_UNIX, kind).connect(address))
    attempt(lambda: socket.socketpair(socket.AF_UNIX, kind)[0].connect(address))
datagrams = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0]
attempt(datagrams.sendto, b"x", T["unix_dgram"])
attempt(datagrams.sendmsg, [b"x"], [], 0, T["unix_dgram"])
attempt(datagrams.bind, FOLDER + "/socket")
attempt(lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b"x", T["unix_dgram"]))
attempt(lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendmsg(
    [b"x"], [], 0, T["unix_dgram"]))
""",
    ),
    Attack(
        "reaches a local server by a relative path",
        "network",
        """
path = path_of(os.path.dirname(T["unix"]))
for name in ("unix", "unix_dgram"):
    os.symlink(T[name], name)
    kind = socket.SOCK_STREAM if name == "unix" else socket.SOCK_DGRAM
    attempt(lambda: socket.socket(socket.AF_UNIX, kind).connect(name))
    attempt(lambda: socket.socket(socket.AF_UNIX, kind).connect(f"/proc/self/fd/{path}/{name}"))
os.fchdir(path)
attempt(lambda: socket.socket(socket.AF_UNIX).connect(os.path.basename(T["unix"])))
""",
    ),
    Attack(
        "connects by TCP",
        "network",
        """
attempt(lambda: socket.socket().connect(LOOPBACK))
attempt(lambda: socket.socket(socket.AF_INET6).connect(("::ffff:127.0.0.1", T["tcp"])))
attempt(lambda: socket.socket().sendto(b"x", socket.MSG_FASTOPEN, LOOPBACK))
attempt(lambda: socket.socket().sendmsg([b"x"], [], socket.MSG_FASTOPEN, LOOPBACK))
attempt(lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262).connect(LOOPBACK))  # MPTCP
attempt(lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM, 132).connect(LOOPBACK))  # SCTP
attempt(lambda: socket.socket(socket.AF_SMC if hasattr(socket, "AF_SMC") else 43).connect(LOOPBACK))
""",
    ),
    Attack(
        "sends by UDP",
        "network",
        """
for family, address in (
    (socket.AF_INET, ("127.0.0.1", T["udp"])),
    (socket.AF_INET6, ("::1", T["udp6"])),
    (socket.AF_INET6, ("::ffff:127.0.0.1", T["udp"])),
):
    attempt(lambda: socket.socket(family, socket.SOCK_DGRAM).sendto(b"x", address))
    attempt(lambda: socket.socket(family, socket.SOCK_DGRAM).sendmsg([b"x"], [], 0, address))
    attempt(lambda: socket.socket(family, socket.SOCK_DGRAM).connect(address))
    attempt(lambda: socket.socket(family, socket.SOCK_DGRAM, 136).sendto(b"x", address))  # UDP-Lite
""",
    ),
    Attack(
        "changes the address while a packet is judged",
        "network",
        """
one = struct.pack(">HHI8x", 0x0200, T["udp"], 0x7F000001)
two = bytes(16)
address = ctypes.create_string_buffer(16)
stop = time.monotonic() + 0.3

def flip():
    while time.monotonic() < stop:
        ctypes.memmove(address, one, 16)
        ctypes.memmove(address, two, 16)

try:
    box = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    threading.Thread(target=flip).start()
    while time.monotonic() < stop:
        libc.syscall(44, box.fileno(), b"x", ctypes.c_long(1), 0, address, 16)
except OSError:
    pass
""",
        ("harmless",),
    ),
    Attack(
        "sends several packets at once",
        "network",
        """
address = struct.pack(">HHI8x", 0x0200, T["udp"], 0x7F000001)
address = ctypes.create_string_buffer(address[1::-1] + address[2:], 16)
data = ctypes.create_string_buffer(b"x")
part = ctypes.create_string_buffer(struct.pack("PN", ctypes.addressof(data), 1), 16)
header = struct.pack("PI4xPNPNi4xI4x", ctypes.addressof(address), 16,
                     ctypes.addressof(part), 1, 0, 0, 0, 0)
attempt(lambda: call(307, socket.socket(socket.AF_INET, socket.SOCK_DGRAM).fileno(), header, 1, 0))
""",
    ),
    Attack(
        "serves",
        "network",
        """
def listen(family, *address):
    server = socket.socket(family)
    if address:
        server.bind(*address)
    server.listen()

attempt(listen, socket.AF_INET)
attempt(listen, socket.AF_INET, ("127.0.0.1", 0))
attempt(listen, socket.AF_INET6, ("::1", 0))
attempt(listen, socket.AF_UNIX, "own")
attempt(listen, socket.AF_UNIX, "\\0" + T["name"])
attempt(listen, socket.AF_UNIX, T["folder"] + "/socket")
""",
    ),
    Attack(
        "opens other sockets",
        "network",
        """
for family, kind, protocol in (
    (16, 3, 15), (16, 3, 9), (16, 3, 12),  # netlink; sandlock answers for routes itself
    (17, 3, 0x0300), (17, 2, 0x0300),  # packet
    (40, 1, 0), (40, 2, 0),  # vsock
    (38, 5, 0),  # kernel's ciphers
    (2, 3, 1), (2, 3, 255), (10, 3, 58),  # raw
    (15, 3, 2), (29, 3, 1), (31, 3, 1), (44, 3, 0), (41, 2, 0), (30, 1, 0), (21, 5, 0),
):
    attempt(socket.socket, family, kind, protocol)
attempt(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM, 1).connect(("127.0.0.1", 1)))
""",
    ),
    # objects of the kernel
    Attack(
        "shares memory",
        "shared objects",
        """
attempt(call, 29, T["key"], 4096, 0o1600)
attempt(call, 64, T["key"], 1, 0o1600)
attempt(call, 68, T["key"], 0o1600)
attempt(os.memfd_create, "x")
attempt(call, 447, 0)
attempt(call, 319, b"x", 4)  # huge pages
attempt(open, "/dev/shm/" + T["name"], "w")
""",
    ),
    Attack(
        "opens a message queue",
        "shared objects",
        """
attempt(call, 240, T["name"].encode(), 0o102, 0o600, None)
attempt(call, 241, T["name"].encode())
""",
    ),
    Attack(
        "watches files",
        "shared objects",
        """
attempt(lambda: call(254, call(253), FOLDER.encode(), 0xFFF))
attempt(lambda: call(254, call(294, 0), FOLDER.encode(), 0xFFF))
attempt(call, 300, 0, 0)
attempt(call, 300, 0x200, 0)
""",
    ),
    Attack(
        "uses the keys of the kernel",
        "kernel",
        """
attempt(call, 248, b"user", T["name"].encode(), b"x", 1, -3)
attempt(call, 249, b"user", T["name"].encode(), None, -3)
attempt(call, 250, 0, -3, 1)
attempt(call, 250, 1, T["name"].encode())
""",
    ),
    Attack(
        "uses io_uring",
        "kernel",
        "attempt(call, 425, 8, ctypes.create_string_buffer(120))\n"
        "attempt(call, 426, 0, 0, 0, 0, None, 0)\nattempt(call, 427, 0, 0, None, 0)",
    ),
    Attack(
        "counts events, loads programs, handles faults",
        "kernel",
        """
event = ctypes.create_string_buffer(128)
struct.pack_into("IIQ", event, 0, 1, 128, 0)
attempt(call, 298, event, VICTIM, -1, -1, 0)
attempt(call, 298, event, 0, -1, -1, 0)
attempt(call, 321, 0, ctypes.create_string_buffer(120), 120)
attempt(call, 323, 1)
""",
    ),
    Attack(
        "mounts",
        "kernel",
        """
attempt(call, 165, b"none", FOLDER.encode(), b"tmpfs", 0, None)
attempt(call, 165, b".", FOLDER.encode(), None, 4096, None)
attempt(call, 166, FOLDER.encode(), 2)
attempt(call, 428, -100, FOLDER.encode(), 1)
attempt(call, 430, b"tmpfs", 0)
attempt(call, 433, -100, FOLDER.encode(), 0)
attempt(call, 429, -100, b".", -100, FOLDER.encode(), 0)
attempt(call, 442, -100, FOLDER.encode(), 0, bytes(32), 32)
attempt(call, 155, b".", b".")
attempt(os.chroot, ".")
""",
    ),
    Attack(
        "enters namespaces",
        "kernel",
        """
for flag in (0x10000000, 0x20000, 0x20000000, 0x40000000, 0x8000000, 0x4000000, 0x2000000):
    attempt(call, 272, flag)
    attempt(call, 272, 0x10000000 | flag)
    attempt(call, 56, flag | 17, 0, 0, 0, 0)
attempt(call, 435, struct.pack("QQQQQQQQ", 0x10000000, 0, 0, 0, 17, 0, 0, 0), 64)
for pid in (PARENT, VICTIM):
    attempt(lambda: call(308, call(434, pid, 0), 0x20000))
""",
    ),
    Attack(
        "changes the machine",
        "kernel",
        """
attempt(call, 175, b"", 0, b"")
attempt(call, 313, -1, b"", 0)
attempt(call, 163, FILE.encode())
attempt(call, 167, FILE.encode(), 0)
attempt(call, 170, os.uname().nodename.encode(), len(os.uname().nodename))
attempt(call, 103, 10, None, 0)
attempt(call, 172, 3)
attempt(call, 173, 0x80, 1, 1)
attempt(os.open, "/proc/sysrq-trigger", os.O_WRONLY)
attempt(os.open, "/proc/sys/kernel/core_pattern", os.O_WRONLY)
attempt(os.open, "/dev/kmsg", os.O_WRONLY)
attempt(os.open, "/dev/mem", os.O_RDONLY)
attempt(os.open, "/dev/tty", os.O_RDWR)
attempt(os.open, "/dev/ptmx", os.O_RDWR)
attempt(os.open, "/dev/fuse", os.O_RDWR)
attempt(os.open, "/sys/fs/cgroup/cgroup.procs", os.O_WRONLY)
""",
    ),
    # processes of its own
    Attack(
        "forks without end",
        "bombs",
        "for _ in range(300): attempt(os.fork)\nattempt(os.forkpty)",
    ),
    Attack(
        "starts programs",
        "bombs",
        """
import subprocess
attempt(subprocess.run, ["/bin/true"])
attempt(os.posix_spawn, "/bin/true", ["true"], {})
attempt(call, 58)
""",
    ),
    Attack(
        "starts threads without end",
        "bombs",
        """
def start():
    for _ in range(3000):
        threading.Thread(target=time.sleep, args=(100,), daemon=True).start()

threading.stack_size(1 << 15)
try:
    start()
except (RuntimeError, MemoryError, OSError):
    pass
print("harmless", flush=True)
os._exit(0)
""",
        ("harmless", "exit -9", "timeout"),
    ),
    Attack(
        "leaves a daemon",
        "bombs",
        """
attempt(os.fork)
attempt(lambda: call(56, 17, 0, 0, 0, 0))
attempt(lambda: call(435, struct.pack("QQQQQQQQ", 0, 0, 0, 0, 17, 0, 0, 0), 64))
""",
    ),
    Attack(
        "leaves its session and group",
        "bombs",
        """
for function, arguments in (
    (os.setsid, ()),
    (os.setpgid, (0, PARENT)),
    (os.setpgid, (0, T["victim_group"])),
    (os.setpgid, (VICTIM, 0)),
):
    try:
        function(*arguments)
    except OSError:
        continue
""",
        ("harmless",),
    ),
    Attack(
        "runs another program in its place",
        "bombs",
        'os.execv("/bin/sleep", ["sleep", "0"])',
        ("exit 0", "exit -9", "exit 1"),  # it closes its streams before it ends
    ),
    # disk
    Attack(
        "writes a huge file",
        "disk",
        """
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with open("big", "wb", 0) as file:
    while True:
        file.write(bytes(1 << 16))
""",
        ("exit 1",),
        "File too large",
    ),
    Attack(
        "writes sparse files and many large ones",
        "disk",
        """
for i in range(100):
    file = os.open(f"f{i}", os.O_CREAT | os.O_RDWR)
    os.posix_fallocate(file, 0, 900_000)
time.sleep(100)
""",
        ("exit -9",),
        "too many or too large files",
    ),
    Attack(
        "writes many files",
        "disk",
        """
for i in range(5_000):
    os.close(os.open(f"f{i}", os.O_CREAT | os.O_WRONLY))
time.sleep(100)
""",
        ("exit -9",),
        "too many or too large files",
    ),
    Attack(
        "makes many folders",
        "disk",
        'for i in range(5_000): os.mkdir(f"d{i}")\ntime.sleep(100)',
        ("exit -9",),
        "too many or too large files",
    ),
    Attack(
        "nests 3,000 folders",
        "disk",
        """
for i in range(3000):
    os.mkdir("d")
    os.chdir("d")
""",
        ("harmless", "exit -9"),
    ),
    Attack(
        "nests folders with long names, and leaves at once",
        "disk",
        """
name = "n" * 255
for i in range(400):
    os.mkdir(name)
    os.chdir(name)
os._exit(0)
""",
        ("exit 0", "exit -9"),
    ),
    Attack(
        "makes folders without rights",
        "disk",
        """
for mode in (0o000, 0o100, 0o300, 0o500):
    os.umask(0)
    os.mkdir(f"d{mode}", 0o700 if mode != 0o300 else 0o300)
    os.mkdir(f"d{mode}/inner", 0o300)
    open(f"d{mode}/inner/file", "w").close()
    os.mkdir(f"d{mode}/inner/none", mode)
    os.close(os.open(f"d{mode}/shut", os.O_CREAT | os.O_WRONLY, 0))
""",
        ("harmless",),
    ),
    Attack(
        "names files with odd bytes",
        "disk",
        r"""
for name in (b"\xff\xfe", b"a\nb", b" ", b"-rf", b"*", b"\x1b[31m", "\u202e".encode(), b"~", b"'"):
    os.mkdir(b"d" + name)
    open(b"d" + name + b"/" + name, "w").close()
    os.symlink(b"/" + name, b"l" + name)
    os.mkfifo(name)
""",
        ("harmless", "exit 1"),  # a pipe with a name is refused
    ),
    Attack(
        "links in a circle, and out of its folder",
        "disk",
        """
os.symlink("a", "b")
os.symlink("b", "a")
os.symlink(".", "self")
os.symlink(FOLDER, "out")
os.mkdir("deep")
os.symlink(FOLDER, "deep/out")
os.symlink("../..", "deep/up")
os.symlink("x" * 4000, "long")
attempt(os.listdir, "out")
""",
    ),
    Attack(
        "makes files until it is killed",
        "disk",
        """
def make(k):
    i = 0
    while True:
        i += 1
        try:
            os.mkdir(f"r{k}-{i % 7}")
            open(f"r{k}-{i % 7}/f", "w").close()
            os.rename(f"r{k}-{i % 7}", f"s{k}-{i % 5}")
        except OSError:
            pass

for k in range(4):
    threading.Thread(target=make, args=(k,), daemon=True).start()
time.sleep(0.2)
os._exit(0)
""",
        ("exit 0", "exit -9"),
    ),
    Attack(
        "removes its own folder, and puts a link in its place",
        "disk",
        """
here = os.getcwd()
os.unlink("main.py")
attempt(os.rmdir, here)
attempt(os.rename, here, here + "2")
attempt(os.symlink, FOLDER, here)
""",
    ),
    # output, time and memory
    Attack(
        "floods standard output",
        "output and time",
        'while True: os.write(1, b"line\\n" * 9999)',
        ("exit -9",),
        "printed too much",
    ),
    Attack(
        "floods standard error",
        "output and time",
        'while True: os.write(2, b"line\\n" * 9999)',
        ("exit -9",),
        "printed too much",
    ),
    Attack(
        "floods without a line end",
        "output and time",
        'while True: os.write(1, b"\\0" * 60_000)',
        ("exit -9",),
        "printed too much",
    ),
    Attack(
        "fills the memory",
        "output and time",
        "kept = []\nwhile True: kept.append(bytearray(1 << 22))",
        ("exit 1", "exit -9", "exit -11"),
    ),
    Attack(
        "maps memory in C",
        "output and time",
        """
libc.malloc.restype = ctypes.c_void_p
while (block := libc.malloc(ctypes.c_size_t(1 << 22))):
    ctypes.memset(block, 1, 1 << 22)
print("harmless", flush=True)
os._exit(0)
""",
        ("harmless", "exit -9", "exit -11"),
    ),
    Attack(
        "recurses in C",
        "output and time",
        'sys.setrecursionlimit(10**9)\njson.loads("[" * 10**6)',
        ("exit -11", "exit -9"),
    ),
    Attack(
        "loops and ignores signals",
        "output and time",
        """
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
while True: pass
""",
        ("timeout", "exit -9"),
    ),
    Attack(
        "closes its streams and runs on",
        "output and time",
        "for file in (0, 1, 2): os.close(file)\ntime.sleep(100)",
        ("exit -9", "timeout"),
    ),
    Attack(
        "stops itself",
        "output and time",
        "os.kill(os.getpid(), signal.SIGSTOP)",
        ("timeout",),
    ),
    Attack(
        "reads its input slowly",
        "output and time",
        "while True:\n    os.read(0, 1)\n    time.sleep(0.05)",
        ("timeout",),
    ),
    # what it inherits
    Attack(
        "writes to inherited descriptors",
        "inheritance",
        """
for file in range(3, 256):
    attempt(os.write, file, b"x")
    attempt(os.read, file, 1)
    attempt(os.fchmod, file, 0o777)
""",
    ),
    Attack(
        "has capabilities",
        "inheritance",
        """
header = struct.pack("Ii", 0x20080522, 0)
data = ctypes.create_string_buffer(24)
call(125, header, data)
if any(data.raw[:4] + data.raw[12:16]):
    attempt(str, "effective", data.raw.hex())
if libc.prctl(39, 0, 0, 0, 0) != 1:
    attempt(str, "may get new privileges")
attempt(os.setuid, os.getuid() + 1)
attempt(os.setgroups, [])
attempt(call, 126, header, struct.pack("IIIIII", *[0xFFFFFFFF] * 6))
""",
    ),
    Attack(
        "runs a program with the rights of its owner",
        "inheritance",
        'os.execv("/bin/su", ["su", "root", "-c", "touch " + FILE + "-root"])',
        ("timeout", "exit 1", "exit 127", "exit 126"),
    ),
    Attack(
        "reads the environment of the trainer",
        "inheritance",
        """
for name in os.environ:
    if name in T["secret"]:
        attempt(str, name)
""",
        ("harmless",),
    ),
)
