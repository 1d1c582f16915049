# ruff: noqa: E501
"""Programs that try to get out of the sandbox: to read, write, signal, connect or leave something outside.

`{secret}` is a file that holds `SECRET`, `{target}` one to be damaged, `{dir}` their folder, `{port}` a TCP
port, `{abstract}` and `{path}` sockets, `{shm}` a shared memory segment, `{pid}` the process that grades; all
of them are open to everybody. A program passes if its `f()` returns what only the secret says.
"""

from __future__ import annotations

SECRET = "7f3a-not-in-the-sandbox"

NATIVE = r"""
#include <Python.h>
#include <errno.h>
#include <unistd.h>
static PyObject *call(PyObject *self, PyObject *args) {
    long a[7] = {0};
    for (Py_ssize_t i = 0; i < PyTuple_Size(args) && i < 7; i++) {
        PyObject *x = PyTuple_GetItem(args, i);
        if (PyBytes_Check(x)) a[i] = (long)PyBytes_AsString(x);
        else if (PyByteArray_Check(x)) a[i] = (long)PyByteArray_AsString(x);
        else a[i] = PyLong_AsLong(x);
    }
    errno = 0;
    long r = syscall(a[0], a[1], a[2], a[3], a[4], a[5], a[6]);
    return PyLong_FromLong(r < 0 ? -errno : r);
}
static PyObject *peek(PyObject *self, PyObject *args) {
    unsigned long at; int n;
    if (!PyArg_ParseTuple(args, "ki", &at, &n)) return NULL;
    return PyBytes_FromStringAndSize((char *)at, n);
}
static PyMethodDef methods[] = {{"call", call, METH_VARARGS, ""}, {"peek", peek, METH_VARARGS, ""}, {0}};
static struct PyModuleDef raw = {PyModuleDef_HEAD_INIT, "raw", "", -1, methods};
PyMODINIT_FUNC PyInit_raw(void) { return PyModule_Create(&raw); }
"""
LOAD_NATIVE = (
    "import base64, zlib, importlib.util as u\n"
    "open('raw.so', 'wb').write(zlib.decompress(base64.b64decode('{native}')))\n"
    "s = u.spec_from_file_location('raw', './raw.so'); raw = u.module_from_spec(s); s.loader.exec_module(raw)\n"
    "c = raw.call\n"
)

# Expressions whose value is the secret, if they get it.
_READ = {
    "open": "open(r'{secret}').read()",
    "open, through its own folder": "open('./' + '../' * 30 + r'{secret}'[1:]).read()",
    "open, bytes": "open(rb'{secret}').read()",
    "os.open": "__import__('os').read(__import__('os').open(r'{secret}', 0), 99).decode()",
    "os.open, path only": "open('/proc/self/fd/%d' % __import__('os').open(r'{secret}', 0o10000000)).read()",
    "os.open below a folder": "(o := __import__('os')).read(o.open('secret', 0, dir_fd=o.open(r'{dir}', 0)), 99).decode()",
    "os.open below a folder, path only": "(o := __import__('os')).read(o.open('secret', 0, dir_fd=o.open(r'{dir}', 0o10200000)), 99).decode()",
    "chdir": "[__import__('os').chdir(r'{dir}'), open('secret').read()][1]",
    "io": "__import__('io').FileIO(r'{secret}').readall().decode()",
    "io.open_code": "__import__('io').open_code(r'{secret}').read().decode()",
    "pathlib": "__import__('pathlib').Path(r'{secret}').read_text()",
    "linecache": "__import__('linecache').getline(r'{secret}', 1).strip()",
    "fileinput": "next(__import__('fileinput').input(r'{secret}'))",
    "codecs": "__import__('codecs').open(r'{secret}').read()",
    "mmap": "(o := __import__('os'), m := __import__('mmap').mmap(o.open(r'{secret}', 0), 0, prot=1))[1][:].decode()",
    "shutil": "[__import__('shutil').copy(r'{secret}', 'here'), open('here').read()][1]",
    "a hard link": "[__import__('os').link(r'{secret}', 'here'), open('here').read()][1]",
    "a symbolic link": "[__import__('os').symlink(r'{secret}', 'here'), open('here').read()][1]",
    "a symbolic link to the folder": "[__import__('os').symlink(r'{dir}', 'd'), open('d/secret').read()][1]",
    "a symbolic link, with dir_fd": "[(o := __import__('os')).symlink(r'{secret}', 'l', dir_fd=o.open('.', 0)), open('l').read()][1]",
    "rename": "[__import__('os').rename(r'{secret}', 'here'), open('here').read()][1]",
    "/proc/self/root": "open(r'/proc/self/root{secret}').read()",
    "/proc/self/cwd": "open('/proc/self/cwd/' + '../' * 30 + r'{secret}'[1:]).read()",
    "/proc/PID/root": "open(r'/proc/{pid}/root{secret}').read()",
    "/proc/PID/cwd": "open('/proc/{pid}/cwd/secret').read()",
    "runpy": "__import__('runpy').run_path(r'{secret}')['x']",
    "import": "[__import__('sys').path.append(r'{dir}'), __import__('secretmodule').x][1]",
    "zipimport": "__import__('zipimport').zipimporter(r'{dir}/secret.zip').load_module('secretmodule').x",
    "an extension module's error": "str(__import__('importlib.machinery').machinery.ExtensionFileLoader('x', r'{secret}').create_module(None))",
    "sqlite3": "[__import__('sqlite3').connect(r'{dir}/secret.db').execute('select x from t').fetchone()][0][0]",
    "sqlite3, attached": "[(d := __import__('sqlite3').connect(':memory:')).execute('attach ? as o', [r'{dir}/secret.db']), d.execute('select x from o.t').fetchone()[0]][1]",
    "sqlite3, by URI": "__import__('sqlite3').connect('file:{dir}/secret.db?mode=ro&immutable=1', uri=True).execute('select x from t').fetchone()[0]",
    "dbm": "__import__('dbm').open(r'{secret}')['x']",
    "numpy, fromfile": "bytes(__import__('numpy').fromfile(r'{secret}', dtype='u1')).decode()",
    "numpy, memmap": "bytes(__import__('numpy').memmap(r'{secret}', mode='r')).decode()",
    "numpy, loadtxt": "str(__import__('numpy').loadtxt(r'{secret}', dtype=str))",
    "numpy, genfromtxt": "str(__import__('numpy').genfromtxt(r'{secret}', dtype=str))",
    "pyarrow": "__import__('pyarrow').OSFile(r'{secret}').read().decode()",
    "pyarrow, mapped": "__import__('pyarrow').memory_map(r'{secret}').read().decode()",
    "pyarrow, its filesystem": "__import__('pyarrow.fs').fs.LocalFileSystem().open_input_stream(r'{secret}').read().decode()",
    "pyarrow, csv": "__import__('pyarrow.csv').csv.read_csv(r'{secret}').column_names[0]",
    "ctypes": "(lambda c, b: (c.CDLL(None).read(c.CDLL(None).open(rb'{secret}', 0), b, 99), b.value.decode())[1])(__import__('ctypes'), __import__('ctypes').create_string_buffer(99))",
    "_ctypes": "__import__('_ctypes').dlopen(r'{secret}', 2)",
    "subprocess": "__import__('subprocess').check_output(['cat', r'{secret}'], text=True)",
    "os.popen": "__import__('os').popen(r'cat {secret}').read()",
    "shared memory": "bytes(__import__('multiprocessing.shared_memory').shared_memory.SharedMemory('{shmname}').buf[:23]).decode()",
    "_posixshmem": "open(__import__('_posixshmem').shm_open('/{shmname}', 0, mode=0)).read()[:23]",
    "/dev/shm": "open('/dev/shm/{shmname}').read()[:23]",
    "an open descriptor": "(lambda o, s: next(o.pread(fd, 99, 0).decode() for fd in range(3, 256) if s.S_ISREG(o.fstat(fd).st_mode)))(__import__('os'), __import__('stat'))",
    "environment": "open('/proc/{pid}/environ').read().split('SECRET=')[1][:23]",
    "own environment": "__import__('os').environ['SECRET']",
    "native: open": "[b := bytearray(99), c(0, c(2, rb'{secret}', 0), b, 99), b.rstrip(b'\\0').decode()][2]",
    "native: openat2": "[b := bytearray(99), c(0, c(437, -100, rb'{secret}', bytes(24), 24), b, 99), b.rstrip(b'\\0').decode()][2]",
    "native: path, then reopened": "[b := bytearray(99), c(0, c(257, c(2, rb'{dir}', 0o10200000), b'secret', 0), b, 99), b.rstrip(b'\\0').decode()][2]",
    "native: hard link": "[c(86, rb'{secret}', b'here'), open('here').read()][1]",
    "native: symbolic link": "[c(88, rb'{secret}', b'here'), open('here').read()][1]",
    "native: rename": "[c(82, rb'{secret}', b'here'), open('here').read()][1]",
    "native: chroot": "[c(161, rb'{dir}'), c(2, b'/secret', 0), open('/secret').read()][2]",
    "native: mount": "[c(165, rb'{dir}', b'.', 0, 4096, 0), open('secret').read()][1]",
    "native: open_tree": "[b := bytearray(99), t := c(428, -100, rb'{dir}', 1), c(0, c(257, t, b'secret', 0), b, 99), b.rstrip(b'\\0').decode()][3]",
    "native: by handle": "[h := bytearray(140), h.__setitem__(0, 128), m := bytearray(4), c(303, -100, rb'{secret}', h, m, 0), b := bytearray(99), c(0, c(304, 3, h, 0), b, 99), b.rstrip(b'\\0').decode()][6]",
    "native: shmat": "raw.peek(c(30, {shm}, 0, 0o10000), 23).decode()",
    "native: io_uring": "str(c(425, 8, bytearray(120)))",
    "native: readlink of a descriptor": "[b := bytearray(99), c(89, b'/proc/self/exe', b, 99), b.decode()][2]",
    "native: the grader's memory": "[b := bytearray(1 << 16), c(310, {pid}, bytes(16), 1, bytes(16), 1, 0), b.decode()][2]",
    "native: ptrace": "str(c(101, 16, {pid}, 0, 0))",
    "native: the worker's memory": "str(c(101, 16, c(110), 0, 0))",
    "native: a descriptor of the grader": "[p := c(434, {pid}, 0), open(c(438, p, 3, 0)).read()][1]",
    "native: splice": "[f := c(2, rb'{secret}', 0), c(326, f, 0, c(2, b'here', 66, 511), 0, 99, 0), open('here').read()][2]",
    "native: new namespaces": "[c(272, 0x10020000), c(165, b'x', b'/', 0, 0x44000, 0), open(r'{secret}').read()][2]",
    "native: setns": "[c(308, c(434, {pid}, 0), 0x20000), open(r'{secret}').read()][1]",
}
# Statements that damage what lies outside, or leave something there.
_WRITE = {
    "open": "open(r'{target}', 'w').write('x')",
    "open, to append": "open(r'{target}', 'a').write('x')",
    "open, both ways": "open(r'{target}', 'r+').write('x')",
    "open, a new file": "open(r'{dir}/new', 'x')",
    "os.open, truncated while read": "os.open(r'{target}', os.O_RDONLY | os.O_TRUNC)",
    "os.open below a folder": "os.write(os.open('target', os.O_WRONLY, dir_fd=os.open(r'{dir}', os.O_PATH)), b'x')",
    "os.truncate": "os.truncate(r'{target}', 0)",
    "os.remove": "os.remove(r'{target}')",
    "os.remove with dir_fd": "os.remove('target', dir_fd=os.open(r'{dir}', os.O_PATH))",
    "os.rename": "os.rename(r'{target}', r'{dir}/new')",
    "os.rename, onto it": "open('x', 'w').close(); os.rename('x', r'{target}')",
    "os.rename out, with dir_fd": "open('x', 'w').close(); os.rename('x', 'new', dst_dir_fd=os.open(r'{dir}', os.O_PATH))",
    "os.replace": "open('x', 'w').close(); os.replace('x', r'{target}')",
    "os.mkdir": "os.mkdir(r'{dir}/new')",
    "os.rmdir": "os.rmdir(r'{dir}/empty')",
    "os.symlink": "os.symlink('/etc/passwd', r'{dir}/new')",
    "os.link": "open('x', 'w').close(); os.link('x', r'{dir}/new')",
    "os.mkfifo": "os.mkfifo(r'{dir}/new')",
    "os.mknod": "os.mknod(r'{dir}/new')",
    "os.chmod": "os.chmod(r'{target}', 0o777)",
    "os.chmod with dir_fd": "os.chmod('target', 0o777, dir_fd=os.open(r'{dir}', os.O_PATH))",
    "os.fchmod": "os.fchmod(os.open(r'{target}', os.O_RDONLY), 0o777)",
    "os.chown": "os.chown(r'{target}', 1, 1)",
    "os.utime": "os.utime(r'{target}', (0, 0))",
    "os.setxattr": "os.setxattr(r'{target}', 'user.x', b'x')",
    "shutil.rmtree": "__import__('shutil').rmtree(r'{dir}')",
    "shutil.move": "__import__('shutil').move(r'{target}', 'x')",
    "pathlib": "__import__('pathlib').Path(r'{target}').write_text('x')",
    "tempfile": "__import__('tempfile').NamedTemporaryFile(dir=r'{dir}', delete=False)",
    "tempfile, its folder": "__import__('tempfile').mkdtemp(dir=r'{dir}')",
    "/tmp": "open('/tmp/r1-written', 'w')",
    "/dev/shm": "open('/dev/shm/r1-written', 'w')",
    "/var/tmp": "open('/var/tmp/r1-written', 'w')",
    "shared memory": "__import__('multiprocessing.shared_memory').shared_memory.SharedMemory('r1-written', create=True, size=9)",
    "_posixshmem": "__import__('_posixshmem').shm_open('/r1-written', os.O_CREAT | os.O_RDWR, mode=0o666)",
    "a semaphore": "__import__('_multiprocessing').SemLock(0, 1, 1, '/r1-written', False)",
    "sqlite3": "d = __import__('sqlite3').connect(r'{dir}/new'); d.execute('create table t (x)'); d.commit()",
    "sqlite3, attached": "d = __import__('sqlite3').connect(':memory:'); d.execute('attach ? as o', [r'{dir}/secret.db']); d.execute('drop table o.t'); d.commit()",
    "sqlite3, vacuum": "d = __import__('sqlite3').connect(':memory:'); d.execute('create table t (x)'); d.execute('vacuum into ?', [r'{dir}/new'])",
    "sqlite3, backup": "__import__('sqlite3').connect(':memory:').backup(__import__('sqlite3').connect(r'{dir}/secret.db'))",
    "dbm": "__import__('dbm.dumb').dumb.open(r'{dir}/new', 'c')['x'] = 'y'",
    "numpy, tofile": "__import__('numpy').zeros(9).tofile(r'{target}')",
    "numpy, memmap": "__import__('numpy').memmap(r'{target}', mode='r+')[:] = 0",
    "numpy, save": "__import__('numpy').save(r'{dir}/new', 0)",
    "pyarrow": "__import__('pyarrow').OSFile(r'{target}', 'wb').write(b'x')",
    "pyarrow, deleting": "__import__('pyarrow.fs').fs.LocalFileSystem().delete_file(r'{target}')",
    "pyarrow, the folder": "__import__('pyarrow.fs').fs.LocalFileSystem().delete_dir_contents(r'{dir}')",
    "pyarrow, a new folder": "__import__('pyarrow.fs').fs.LocalFileSystem().create_dir(r'{dir}/new')",
    "pyarrow, moving": "__import__('pyarrow.fs').fs.LocalFileSystem().move(r'{target}', r'{dir}/new')",
    "pyarrow, mapped": "__import__('pyarrow').create_memory_map(r'{dir}/new', 9)",
    "logging": "__import__('logging.handlers').handlers.RotatingFileHandler(r'{dir}/new').emit",
    "py_compile": "open('x.py', 'w').close(); __import__('py_compile').compile('x.py', r'{dir}/new')",
    "Python's own files": "open(os.__file__, 'a')",
    "Python's own files, mode": "os.chmod(os.__file__, 0o600)",
    "faulthandler": "__import__('faulthandler').enable(open(r'{target}', 'w'))",
    "native: creat": "c(85, rb'{target}', 511)",
    "native: open": "c(1, c(2, rb'{target}', 1), b'x', 1)",
    "native: open, truncated while read": "c(2, rb'{target}', 0o1000)",
    "native: truncate": "c(76, rb'{target}', 0)",
    "native: unlink": "c(87, rb'{target}')",
    "native: unlinkat": "c(263, -100, rb'{target}', 0)",
    "native: rename": "c(82, rb'{target}', rb'{dir}/new')",
    "native: rename out": "open('x', 'w').close(); c(82, b'x', rb'{dir}/new')",
    "native: exchange": "open('x', 'w').close(); c(316, -100, b'x', -100, rb'{target}', 2)",
    "native: link": "open('x', 'w').close(); c(86, b'x', rb'{dir}/new')",
    "native: symlink": "c(88, b'/etc/passwd', rb'{dir}/new')",
    "native: mkdir": "c(83, rb'{dir}/new', 511)",
    "native: rmdir": "c(84, rb'{dir}/empty')",
    "native: mknod": "c(133, rb'{dir}/new', 0o100666, 0)",
    "native: mknodat, a fifo": "c(259, -100, rb'{dir}/new', 0o10666, 0)",
    "native: chmod": "c(90, rb'{target}', 0o777)",
    "native: fchmod of Python's own": "import string; c(91, c(2, string.__file__.encode(), 0), 0o600)",
    "native: fchmodat2": "c(452, -100, rb'{target}', 0o777, 0)",
    "native: chown": "c(92, rb'{target}', 1, 1)",
    "native: fchownat": "c(260, -100, rb'{target}', 1, 1, 0)",
    "native: utimensat": "c(280, -100, rb'{target}', bytes(32), 0)",
    "native: utime": "c(132, rb'{target}', bytes(16))",
    "native: setxattr": "c(188, rb'{target}', b'user.x', b'x', 1, 0)",
    "native: file flags": "c(16, c(2, rb'{target}', 0), 0x40086602, (0x80).to_bytes(8, 'little'))",
    "native: flags of Python's own": "import string; c(16, c(2, string.__file__.encode(), 0), 0x40086602, (0x80).to_bytes(8, 'little'))",
    "native: /dev/shm": "c(2, b'/dev/shm/r1-written', 66, 511)",
    "native: a fork that stays": "pid = c(57)\nif pid == 0:\n  while True: c(35, b'\\x09' + bytes(15), 0)",
    "native: clone": "pid = c(56, 17, 0, 0, 0, 0)\nif pid == 0:\n  while True: c(35, b'\\x09' + bytes(15), 0)",
    "native: clone3": "pid = c(435, bytes(32) + b'\\x11' + bytes(55), 88)\nif pid == 0:\n  while True: c(35, b'\\x09' + bytes(15), 0)",
    "native: vfork and exec": "c(59, b'/bin/sleep', bytes(8), bytes(8))",
    "native: a session of its own": "c(112)",
    "native: shared memory": "c(29, 0x7231, 99, 0o1666)",
    "native: a semaphore": "c(64, 0x7231, 1, 0o1666)",
    "native: a message queue": "c(68, 0x7231, 0o1666)",
    "native: a POSIX queue": "c(240, b'r1-written', 66, 511, 0)",
    "native: TCP": "s = c(41, 2, 1, 0); c(42, s, b'\\x02\\x00' + bytes(2) + bytes([127, 0, 0, 1]) + bytes(8), 16)",
    "native: TCP to the listener": "s = c(41, 2, 1, 0); c(42, s, b'\\x02\\x00' + ({port}).to_bytes(2, 'big') + bytes([127, 0, 0, 1]) + bytes(8), 16)",
    "native: abstract socket": "s = c(41, 1, 1, 0); a = b'\\x01\\x00\\x00{abstract}'; c(42, s, a, len(a))",
    "native: socket of a path": "s = c(41, 1, 1, 0); a = b'\\x01\\x00{path}\\x00'; c(42, s, a, len(a))",
    "native: kill": "c(62, {pid}, 9)",
    "native: kill everybody": "c(62, -1, 9)",
    "native: kill its group": "c(62, 0, 9)",
    "native: kill its parent": "c(62, c(110), 9)",
    "native: tkill": "c(200, {pid}, 9)",
    "native: tgkill": "c(234, {pid}, {pid}, 9)",
    "native: sigqueue": "c(129, {pid}, 9, bytes(128))",
    "native: pidfd": "c(424, c(434, {pid}, 0), 9, 0, 0)",
    "native: a signal by a file's owner": "c(72, 3, 10, 9); c(72, 3, 8, {pid}); c(72, 3, 4, 0o20000)",
    "native: a signal by a socket's owner": "c(72, 3, 10, 9); c(16, 3, 0x8901, ({pid}).to_bytes(4, 'little')); c(72, 3, 4, 0o20000)",
    "native: the grader's limits": "c(302, {pid}, 0, (1).to_bytes(8, 'little') * 2, 0)",
    "native: the worker's limits": "c(302, c(110), 0, (1).to_bytes(8, 'little') * 2, 0)",
    "native: the grader's priority": "c(141, 0, {pid}, 19)",
    "native: the grader's scheduling": "c(144, {pid}, 5, bytes(8))",
    "native: the grader's CPUs": "c(203, {pid}, 8, b'\\x01' + bytes(7))",
    "native: host name": "c(170, b'r1-written', 10)",
    "native: the clock": "c(227, 0, bytes(16))",
    "native: dumpable": "c(157, 4, 1, 0, 0, 0); open('/proc/self/oom_score_adj', 'w').write('0')",
    "native: another filter": "c(317, 1, 0, bytes(16))",
    "native: capabilities": "c(126, b'\\x22\\x05\\x08\\x20' + bytes(4), b'\\xff' * 24); c(62, -1, 9)",
    "native: user 0": "c(105, 0); c(62, -1, 9)",
    "socket": "import socket; socket.create_connection(('127.0.0.1', {port}))",
    "socket, abstract": "import socket; socket.socket(socket.AF_UNIX).connect('\\0{abstract}')",
    "socket, a path": "import socket; socket.socket(socket.AF_UNIX).connect(r'{path}')",
    "socket, from a descriptor": "import _socket; _socket.socket(fileno=3).connect(('127.0.0.1', {port}))",
    "urllib": "import urllib.request; urllib.request.urlopen('http://127.0.0.1:{port}')",
    "asyncio": "import asyncio; asyncio.run(asyncio.open_connection('127.0.0.1', {port}))",
    "kill": "os.kill({pid}, 9)",
    "kill its parent": "os.kill(os.getppid(), 9)",
    "kill its group": "os.killpg(0, 9)",
    "fcntl, a signal by a file's owner": "import fcntl; fcntl.fcntl(3, 10, 9); fcntl.fcntl(3, 8, {pid}); fcntl.fcntl(3, 4, 0o20000)",
    "resource, the grader's limits": "import resource; resource.prlimit({pid}, resource.RLIMIT_CPU, (1, 1))",
    "os.fork": "os.fork()",
    "os.posix_spawn": "os.posix_spawn('/bin/sleep', ['sleep', '99'], {})",
    "os.system": "os.system('sleep 99 &')",
    "_posixsubprocess": "import _posixsubprocess as p; p.fork_exec([b'/bin/sleep', b'99'], [b'/bin/sleep'], True, (3,), None, None, -1, -1, -1, -1, -1, -1, 5, 6, False, False, 0, None, None, None, -1, None, False)",
    "multiprocessing": "import multiprocessing as m; m.Process(target=print).start()",
    "multiprocessing, forkserver": "import multiprocessing as m; m.get_context('forkserver').Process(target=print).start()",
    "pty": "import pty; pty.spawn('/bin/sh')",
    "nested folders": "for _ in range(1500): os.mkdir('d'); os.chdir('d')",
    "nested folders, locked": "for _ in range(50): os.mkdir('d'); os.chmod('d', 0o700); os.chdir('d')\nos.chmod('.', 0)",
    "many files": "for i in range(3000): open(str(i), 'w')",
    "names of all kinds": "for n in ['-rf', '*', ' ', 'a\\nb', '..x', '~', '$HOME', b'\\xff']: open(n, 'w')",
    "a loop of links": "os.symlink('a', 'b'); os.symlink('b', 'a'); os.symlink('.', 'c'); os.symlink('/', 'r')",
    "links out, to be cleaned up through": "os.symlink(r'{dir}', 'd'); os.mkdir('e'); os.symlink(r'{dir}', 'e/d')",
    "a fifo, to be waited on": "os.mkfifo('p')",
    "an immutable file": "import fcntl; f = open('x', 'w'); fcntl.ioctl(f, 0x40086602, bytes([16] + [0] * 7))",
    "a sparse file": "f = open('x', 'wb'); f.seek(1 << 40); f.write(b'x')",
    "a large file": "open('x', 'wb').write(bytes(17 << 20))",
    "many descriptors": "x = [open(os.devnull) for _ in range(9999)]",
    "closed descriptors": "os.closerange(0, 999)",
    "its own limits": "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 40, 1 << 40))",
    "its own memory": "open('/proc/self/mem', 'r+b')",
    "core": "import resource; resource.setrlimit(resource.RLIMIT_CORE, (-1, -1)); os.abort()",
    "stops itself": "import signal; signal.raise_signal(signal.SIGTSTP)",
    "a thread that writes": "import threading; threading.Thread(target=lambda: open(r'{target}', 'w')).start()",
    "a finalizer that writes": "class X:\n  def __del__(s): open(r'{target}', 'w')\nx = X(); del x",
    "an audit hook of its own": "import sys; sys.addaudithook(lambda *a: None); open(r'{target}', 'w')",
    "the hook's own frame": "try: open(r'{target}')\nexcept OSError as e:\n  t = e.__traceback__\n  while t.tb_next: t = t.tb_next\n"
    "  t.tb_frame.f_locals['within'].__defaults__ = (('/',), ('/',))\nopen(r'{target}', 'w')",
    "an import hook": "import sys; sys.meta_path.insert(0, None); import this",
}  # fmt: skip


def programs(fill: dict[str, str]) -> dict[str, str]:
    """Every program by name; those of `native` code only where `fill` has it compiled."""
    out = {f"reads: {name}": f"def f(): return {body}" for name, body in _READ.items()}
    out |= {f"writes: {name}": f"import os\n{body}\ndef f(): return 'done'" for name, body in _WRITE.items()}
    done = {}
    for name, text in out.items():
        if "native" in name:
            if "native" not in fill:
                continue
            text = LOAD_NATIVE + text
        for key, value in fill.items():
            text = text.replace(f"{{{key}}}", value)
        done[name] = text
    return done
