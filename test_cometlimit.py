"""What cometlimit promises, one class per promise. Nothing here leaves the machine.

Time and chance are replaced: a wait moves a clock that all share, so hardly any test sleeps. Where
several calls wait, each its own time, the clock is the real one made fast.
"""
import asyncio
import collections
import concurrent.futures
import contextlib
import copy
import errno
import fcntl
import gc
import gzip
import heapq
import inspect
import io
import itertools
import json
import logging
import lzma
import math
import os
import pickle
import pty
import random
import re
import resource
import select
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
import traceback
import tracemalloc
import types
import unittest
import unittest.mock
import urllib.parse
import urllib.request
import warnings
import zlib
import weakref

import cometlimit

TIMEOUT = 20.0  # no wait in here is longer
FOLDER = os.path.dirname(os.path.abspath(cometlimit.__file__))
PROGRAM = [sys.executable, "-X", "dev", "-W", "error", "-m", "cometlimit"]
BOM = b"\xef\xbb\xbf"
KEY = "sk-Secret/Key<&>0123456789"
THROTTLE = cometlimit.Throttle


# The scripted server: every test is written in its words


class Line:
    """What a server does with a request: send(sock), and whether the connection stays open."""

    def __init__(self, send, keep=False):
        self.send, self.keep = send, keep


def status(code, body="", headers=()):
    """An answer: body is bytes, a text or a JSON value; headers a dict or pairs."""
    data = body if isinstance(body, bytes) else (
        body if isinstance(body, str) else json.dumps(body)).encode()
    pairs = list(headers.items() if isinstance(headers, dict) else headers)
    if not {"content-length", "transfer-encoding"} & {name.lower() for name, _ in pairs}:
        pairs.append(("Content-Length", len(data)))
    head = "HTTP/1.1 %d Any\r\n%s\r\n" % (code, "".join("%s: %s\r\n" % pair for pair in pairs))
    return raw(head.encode("latin-1") + data, keep=True)


def reply(text, headers=(), **fields):
    """A completion with this text; fields go into the body."""
    return status(200, dict({"model": "m-2024", "choices": [
        {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 2, "completion_tokens": 3}}, **fields), headers)


def reply_echo(request):
    """A completion with the prompt as its text."""
    return reply(request.prompt)


def raw(data, keep=False):
    """These bytes, then the end of the connection."""
    return Line(lambda sock: sock.sendall(data), keep)


# The end of the connection without a byte, and the same by RST
HANG_UP = Line(lambda sock: None)
RESET = Line(lambda sock: sock.setsockopt(
    socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)))


def cut_short(code=200, body=b'{"choices": ['):
    """An answer that announces more bytes than come."""
    return Line(status(code, body, {"Content-Length": len(body) + 50}).send)


def stall(gone=None):
    """No answer; the event is set when the client has hung up."""
    def send(sock):
        with contextlib.suppress(OSError):
            sock.recv(1)
        if gone is not None:
            gone.set()
    return Line(send)


def flood(start, piece, pause=0.0):
    """These bytes, then a piece after the other until the client hangs up."""
    def send(sock):
        sock.sendall(start)
        while piece:
            sock.sendall(piece)
            time.sleep(pause)
        stall().send(sock)
    return Line(send)


class Request:
    """method, path, headers (a dict, lower case), body (JSON), prompt (the last message's text),
    connection (its number, from 1), time (of the client's clock)."""

    def __init__(self, reader, connection):
        self.time, self.connection = cometlimit._now(), connection
        self.method, self.path = reader.readline().decode("latin-1").split()[:2]
        lines = (line.decode("latin-1") for line in iter(reader.readline, b"\r\n"))
        self.headers = {name.strip().lower(): value.strip()
                        for name, _, value in (line.partition(":") for line in lines)}
        data = reader.read(int(self.headers.get("content-length", 0)))
        self.body = json.loads(data.decode()) if data else None
        self.prompt = self.body["messages"][-1]["content"] if self.body else None


class Server:
    """A port of 127.0.0.1 with a thread for each connection; all end with the block.

    Each request takes the next line of the script: a Line, or a function of the request that
    returns one. What is beyond the script gets `forever` or, without it, status 599. The block
    fails if a line is left. job(sock) has each connection to itself instead. tls is the name or
    address in its certificate."""

    def __init__(self, *script, forever=None, job=None, tls=None):
        self.script, self.forever, self.job, self.tls = list(script), forever, job, tls
        self.requests = [] if forever is None else collections.deque(maxlen=2000)
        self.sockets, self.threads, self.faults = [], [], []
        self.flying = self.peak = self.connections = 0
        self.changed, self.ending = threading.Condition(), False

    def __enter__(self):
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen(128)
        self.port = self.listener.getsockname()[1]
        self.url = "%s://127.0.0.1:%d/v1" % ("https" if self.tls else "http", self.port)
        self.start(self.accept)
        return self

    def start(self, job, *args):
        def run():
            try:
                job(*args)
            except OSError:
                pass  # the other side is gone
            except Exception as fault:
                self.faults.append(fault)
        self.threads.append(threading.Thread(target=run, daemon=True))
        self.threads[-1].start()

    def accept(self):
        while True:
            sock = self.listener.accept()[0]
            if self.ending:
                return sock.close()
            self.connections += 1
            self.start(self.serve, self.own(sock), self.connections)

    def own(self, sock):
        sock.settimeout(TIMEOUT)
        self.sockets.append(sock)
        return sock

    def serve(self, sock, number):
        if self.tls:
            sock = self.own(server_context(certificate(self.tls)).wrap_socket(sock, True))
        if self.job:
            with sock:
                return self.job(sock)
        with sock, sock.makefile("rb") as reader:
            while reader.peek(1):
                request = Request(reader, number)
                with self.changed:
                    line = self.script.pop(0) if self.script else self.forever or status(599)
                    self.flying += 1
                    self.peak = max(self.peak, self.flying)
                    self.requests.append(request)
                    self.changed.notify_all()
                try:
                    line = line if isinstance(line, Line) else line(request)
                finally:
                    with self.changed:  # before the answer, which makes room for the next request
                        self.flying -= 1
                line.send(sock)
                if not line.keep:
                    return

    def await_requests(self, count):
        """Return as soon as so many requests have come."""
        with self.changed:
            if not self.changed.wait_for(lambda: len(self.requests) >= count, TIMEOUT):
                raise AssertionError("%d requests, not %d" % (len(self.requests), count))

    def __exit__(self, kind, *_):
        self.ending = True
        socket.create_connection(("127.0.0.1", self.port), TIMEOUT).close()  # wakes accept()
        self.threads[0].join(TIMEOUT)
        for sock in list(self.sockets):
            with contextlib.suppress(OSError):
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
        for thread in self.threads:
            thread.join(TIMEOUT)
        for sock in self.sockets + [self.listener]:
            sock.close()
        if kind is None and self.faults:
            raise self.faults[0]
        if kind is None and self.script:
            raise AssertionError("%d lines of the script were not used" % len(self.script))


class Proxy(Server):
    """A proxy that keeps the head of each request in `heads`; refuse=407 says so to each; `slip`
    are bytes that it sends in the server's place after its own answer."""

    def __init__(self, refuse=None, slip=b""):
        super().__init__()
        self.refuse, self.slip, self.heads = refuse, slip, []

    def serve(self, sock, number):
        with sock:
            head = b""
            while b"\r\n\r\n" not in head:
                head += sock.recv(1)
            self.heads.append(head.decode("latin-1"))
            if self.refuse:
                return status(self.refuse).send(sock)
            verb, target = self.heads[-1].split()[:2]
            host, _, port = target.split("/")[0 if verb == "CONNECT" else 2].rpartition(":")
            with socket.create_connection((host, int(port)), TIMEOUT) as other:
                self.own(other)
                if verb == "CONNECT":
                    raw(b"HTTP/1.1 200 Yes\r\n\r\n" + self.slip).send(sock)
                else:
                    other.sendall(head)
                self.start(self.pump, other, sock)
                self.pump(sock, other)

    @staticmethod
    def pump(source, target):
        for data in iter(lambda: source.recv(1 << 16), b""):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


class Made:
    """Folders: a copy of the module where its bytecode may stay, so processes start twice as fast;
    and certificates, by the first test that needs one."""

    compiled = certificates = None


def openssl(*words):
    return subprocess.run(("openssl",) + words, check=True, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL, timeout=TIMEOUT).stdout.decode()


def certificate(name, signed=True, days="2", usage="keyUsage=critical,keyCertSign,cRLSign"):
    """The file of a certificate for a name or an address, by the CA of "ca" or, not signed, by
    itself. All have one key. Skips the test where there is no openssl command."""
    if shutil.which("openssl") is None:
        raise unittest.SkipTest("there is no openssl command")
    if Made.certificates is None:
        Made.certificates = tempfile.mkdtemp()
        openssl("ecparam", "-genkey", "-name", "prime256v1", "-out", Made.certificates + "/key")
    key, words = Made.certificates + "/key", (name, signed, days, len(usage))
    base = os.path.join(Made.certificates, "%s-%s-%s-%s" % words)
    if not os.path.exists(base):
        kind = "IP" if name[0].isdigit() else "DNS"
        with open(base + ".cnf", "w") as file:
            file.write("[req]\ndistinguished_name=dn\nprompt=no\n[dn]\nCN=%s\n[ext]\n" % name + (
                "subjectKeyIdentifier=hash\nbasicConstraints=critical,CA:TRUE\n" + usage
                if name == "ca" else "authorityKeyIdentifier=keyid\nbasicConstraints=critical,"
                "CA:FALSE\nsubjectKeyIdentifier=hash\nsubjectAltName=%s:%s" % (kind, name)))
        openssl("req", "-new", "-config", base + ".cnf", "-key", key, "-out", base + ".csr")
        issuer = ("-signkey", key) if name == "ca" or not signed else (
            "-CAcreateserial", "-CA", certificate("ca"), "-CAkey", key)
        openssl("x509", "-req", "-days", days, "-in", base + ".csr", "-out", base,
                "-extfile", base + ".cnf", "-extensions", "ext", *issuer)
    return base


def server_context(file):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file, Made.certificates + "/key")
    return context


def setUpModule():
    """Clean the environment; start the demo, which takes its time while the others run."""
    for name in list(os.environ):
        if re.match("(?i)cometapi_|.*_proxy$|SSL|.*_CA_BUNDLE$|PYTHON[UD]|REQUEST_M", name):
            del os.environ[name]
    Made.compiled = os.environ["PYTHONPATH"] = tempfile.mkdtemp()
    os.environ["SSL_CERT_FILE"] = os.devnull  # the system's CAs take 30 ms a client to load
    shutil.copy(os.path.join(FOLDER, "cometlimit.py"), Made.compiled)
    AnOption.demo = subprocess.Popen(PROGRAM + ["--demo"], stdout=subprocess.PIPE,
                                     stderr=subprocess.PIPE)


def tearDownModule():
    shutil.rmtree(Made.compiled)
    with AnOption.demo as process:
        process.kill()
    if Made.certificates is not None:
        shutil.rmtree(Made.certificates)


ASK = '''
with client:
    if client.ask("\\xe9\\u2028 Hi") != "\\xe9\\u2028 Hi": sys.exit("wrong")'''


def start(server, before="", body=ASK, options="", flags=(), shell="exec \"$@\"", **popen):
    """A process that asks a server; its folder is not the module's."""
    source = "\n".join((
        "import os, sys, threading; sys.path.insert(0, %r)" % Made.compiled, before,
        "import cometlimit", "client = cometlimit.Client(api_key=%r, base_url=%r, model='m', %s)"
        % (KEY, server.url, options), body)).replace("\n" + " " * 16, "\n")
    pipe = subprocess.PIPE
    return subprocess.Popen(
        ("sh", "-c", shell, "sh", sys.executable) + tuple(flags) + ("-c", source),
        **dict(dict(stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe), **popen))


def end(process, stdin=None):
    """Its exit status and what it said on stderr."""
    with process:
        try:
            text = process.communicate(stdin, TIMEOUT)[1].decode()
        finally:
            process.kill()
    return process.returncode, text


class Case(unittest.TestCase):
    """A clean environment; a clock that only waits move; chance always at the middle."""

    START = 1696004797.0  # Fri, 29 Sep 2023 16:26:37 GMT

    def setUp(self):
        environ = unittest.mock.patch.dict(os.environ)
        environ.start()
        self.addCleanup(environ.stop)
        self.replace(cometlimit.Throttle, START=1000.0)
        self.seams = {name: getattr(cometlimit, name)
                      for name in ("_now", "_wall", "_random", "_wait")}
        self.addCleanup(self.real_time)
        self.addCleanup(self.threads_end)
        self.now, self.wall, self.waits = 1000.0, self.START, []
        cometlimit._now = lambda: self.now
        cometlimit._wall = lambda: self.wall
        cometlimit._random = lambda: 0.5
        cometlimit._wait = self.wait

    def wait(self, condition, seconds):
        self.waits.append(seconds)
        self.now += seconds

    def real_time(self):
        vars(cometlimit).update(self.seams)

    def fast_clock(self, factor=100.0):
        """The real clock, so many times as fast: for several calls, each of which waits its own
        time. A socket's time-outs stay real; other names of the seams keep what they are."""
        cometlimit._now = lambda: time.monotonic() * factor
        cometlimit._wait = lambda condition, seconds: condition.wait(seconds / factor)

    def threads_end(self):
        end = time.monotonic() + TIMEOUT
        for thread in threading.enumerate():
            if thread.name.startswith("cometlimit"):  # an executor numbers them
                thread.join(max(0.0, end - time.monotonic()))
                self.assertFalse(thread.is_alive(), "a thread is left")

    def replace(self, place, **values):
        """Replace attributes until the test ends."""
        patch = unittest.mock.patch.multiple(place, **values)
        patch.start()
        self.addCleanup(patch.stop)

    def throttle(self, base=THROTTLE, **methods):
        """Replace Throttle by one with these methods."""
        self.replace(cometlimit, Throttle=type("Own", (base,), methods))

    @contextlib.contextmanager
    def within(self, seconds, least=0.0):
        start = time.monotonic()
        yield
        self.assertTrue(least <= time.monotonic() - start < seconds, time.monotonic() - start)

    def beside(self, job, cases):
        """Call job with each of the cases, six at a time."""
        def run(case):
            try:
                job(*case)
            except Exception as fault:
                raise AssertionError(case) from fault
        with concurrent.futures.ThreadPoolExecutor(6) as pool:
            list(pool.map(run, cases))

    def until(self, holds, pause=lambda: time.sleep(0.001)):
        """Return as soon as something holds."""
        end = time.monotonic() + TIMEOUT
        while not holds():
            self.assertLess(time.monotonic(), end)
            pause()

    def client(self, server, **options):
        """A client of a Server, or of a URL."""
        url = getattr(server, "url", server)
        if url.startswith("https"):
            certificate("127.0.0.1")  # now, not in the handshake
            options.setdefault("ca_file", certificate("ca"))
        client = cometlimit.Client(**dict(dict(
            api_key=KEY, base_url=url, model="m", max_concurrency=1), **options))
        self.addCleanup(client.close)
        return client

    def slow(self, line, seconds=0.5):
        """A line of a script that takes so many seconds of the clock."""
        def step(request):
            self.now += seconds
            return line
        return step

    def outcome(self, *script, **options):
        """What becomes of one prompt: a Completion or an Error, once the script is played."""
        self.waits.clear()
        with Server(*script) as server, self.client(server, **options) as client:
            try:
                return client.complete("Hi")
            except cometlimit.Error as error:
                return error

    def assert_error(self, error, kind, text, **details):
        self.assertIs(type(error), kind, repr(error))
        self.assertEqual(str(error), text)
        self.assertEqual({name: getattr(error, name) for name in details}, details)


RETRIED = {408, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529}
GIVEN_UP = (300, 301, 302, 303, 304, 307, 308, 400, 401, 402, 403, 404, 405, 406, 409, 410, 413,
            415, 418, 422, 423, 424, 425, 426, 428, 431, 451, 498, 499, 501, 505, 506, 507, 508,
            510, 511, 519, 525, 526, 527, 528, 530, 598, 599)
PERMANENT = """access_denied billing_hard_limit_reached billing_not_active convert_request_failed
    count_token_failed credit_balance_exhausted gen_relay_info_failed insufficient_quota
    insufficient_user_quota invalid_request missing_required_parameter model_not_found
    model_price_error permission_denied pre_consume_token_quota_failed prompt_blocked
    quota_exceeded sensitive_words_detected""".split()
HEAD = b"HTTP/1.1 200 OK\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"
GOOD = json.dumps({"choices": [{"message": {"content": "all"}}]}).encode()
FRAMED = b"Content-Length: %d\r\n\r\n%s" % (len(GOOD), GOOD)
GONE = "given up: the client was closed"
NAN = float("nan")


def failure(code, number=500, **words):
    return status(number, {"error": dict({"message": "why", "type": "comet_api_error",
                                          "param": "", "code": code}, **words)})


def parameters(function):
    return {name: value.default for name, value in inspect.signature(function).parameters.items()
            if name != "self"}


class Names(Case):
    """Programs of others are written against these."""

    def test_are_those_of_the_design(self):
        """Every public name is exported and documented, and the hierarchy of errors stands."""
        tree = {"ConfigurationError": "Error", "APIConnectionError": "Error",
                "APITimeoutError": "APIConnectionError", "APIStatusError": "Error",
                "RateLimitError": "APIStatusError", "APIResponseError": "Error"}
        self.assertEqual(set(cometlimit.__all__), set(tree) | set(
            "Client Completion Error Metrics Record Throttle ask_all backoff main".split()))
        for name in cometlimit.__all__:
            self.assertTrue(inspect.getdoc(getattr(cometlimit, name)), name)
        for name, base in tree.items():
            self.assertIn(getattr(cometlimit, base), getattr(cometlimit, name).__bases__)
        self.assertTrue(issubclass(cometlimit.ConfigurationError, ValueError))
        self.assertRegex(cometlimit.__version__, r"^\d+\.\d+\.\d+$")

    def test_have_the_defaults_of_the_design(self):
        """Signatures and fields are exactly those of the design."""
        client, empty = cometlimit.Client, inspect.Parameter.empty
        self.assertEqual(parameters(client), dict(
            api_key=None, base_url=None, model=None, max_concurrency=5, max_rate=None,
            max_retries=4, max_delay=30.0, timeout=600.0, deadline=None, stream=None, check=None,
            headers=None, ca_file=None, allow_http=False, on_record=None))
        self.assertTrue(all(value.kind is value.KEYWORD_ONLY for value in
                            inspect.signature(client).parameters.values()))
        one, many = {"prompt": empty, "params": empty}, {"prompts": empty}
        for function, expected in (
                (client.ask, one), (client.complete, one), (client.submit, dict(one, tag=None)),
                (client.map, dict(many, return_exceptions=False, params=empty)),
                (cometlimit.ask_all, dict(many, return_exceptions=False,
                                          options_and_params=empty))):
            self.assertEqual(parameters(function), expected)
        for thing, names in (
                (parameters(cometlimit.backoff), "attempt retry_after max_delay random"),
                (parameters(cometlimit.Throttle), "max_delay random"),
                (cometlimit.Completion._fields, "text model finish_reason usage request_id "
                 "attempts latency body"),
                (cometlimit.Record._fields, "time route model status latency attempt waited "
                 "request_id error prompt_tokens completion_tokens tag")):
            self.assertEqual(" ".join(thing), names)

    def test_cost_nothing_to_import(self):
        """Importing opens nothing, starts nothing, and reads no environment."""
        subprocess.run([sys.executable, "-c", """if True:
            import builtins, io, logging, os, signal, socket, subprocess, sys, threading
            import cometlimit   # and all that it needs, which may do what it wants
            del sys.modules["cometlimit"]
            def never(*args, **named):
                raise SystemExit("the import did something with %r" % (args,))
            builtins.open = io.open = os.open = os.getenv = signal.signal = never
            socket.socket = socket.create_connection = socket.getaddrinfo = never
            threading.Thread.start = subprocess.Popen = never
            os.environ = None
            import cometlimit
            assert not logging.getLogger("cometlimit").handlers + logging.getLogger().handlers
            """], check=True, timeout=TIMEOUT, cwd=FOLDER)


class Values(Case):
    """Completions, Records, Metrics and Errors travel between processes."""

    def test_survive_pickle_and_copy(self):
        """Equal. An error has all its details as its own attributes: Ray leaves out its class's."""
        script = {cometlimit.RateLimitError: failure("busy", 429),
                  cometlimit.APIStatusError: failure("bad", 400),
                  cometlimit.APIResponseError: failure("bad", 200),
                  cometlimit.APIConnectionError: HANG_UP, cometlimit.APITimeoutError: stall()}
        values = [self.outcome(line, max_retries=0, timeout=0.1) for line in script.values()]
        self.assertEqual([type(value) for value in values], list(script))
        values += [cometlimit.Error("e", attempts=2), cometlimit.ConfigurationError("c")]
        for value in values:
            self.assertEqual(set(vars(value)), set(
                "attempts records retryable retry_after status_code request_id code type param "
                "message body".split()))
        with Server(reply("yes")) as server, self.client(server) as client:
            values += [client.complete("Hi"), values[0].records[0], client.metrics]
        for value in values:
            def state(value):
                return str(value), vars(value) if isinstance(value, cometlimit.Error) else (
                    {key: vars(stats) for key, stats in value.items()}
                    if isinstance(value, dict) else value)
            for again in [pickle.loads(pickle.dumps(value, protocol)) for protocol in range(5)] + [
                    copy.copy(value), copy.deepcopy(value)]:
                with self.subTest(value=value):
                    self.assertIs(type(again), type(value))
                    self.assertEqual(state(again), state(value))
        with self.assertRaisesRegex(TypeError, "make one in each process"):
            pickle.dumps(client)

    def test_are_freed_without_the_garbage_collector(self):
        """Nothing refers to a Future, or so to its outcome, once its callbacks have run."""
        gc.disable()
        self.addCleanup(gc.enable)
        with Server(forever=lambda request: status(int(request.prompt))) as server:
            with self.client(server) as client:
                futures = [client.submit(code) for code in ("400", "200")]
                self.assertTrue(all(future.exception(TIMEOUT) for future in futures))
                left = [weakref.ref(future) for future in futures]
                del futures
                self.until(lambda: not any(future() for future in left))


class OneQuestion(Case):
    """ask, complete and submit."""

    def test_is_posted_as_a_chat_completion(self):
        """A prompt is a text, messages, or a body whose fields win over parameters and options."""
        talk = [{"role": "system", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
        body = {"messages": talk, "model": "own", "temperature": 1}
        with Server(*[reply("yes")] * 4) as server, self.client(server) as client:
            self.assertEqual(client.ask("Hi", temperature=0, stop=["é"], model="n"), "yes")
            client.ask(talk)
            client.ask(body, model="n", temperature=0, seed=7, stream=False)
            list(client.map([body], seed=8))
        self.assertEqual([request.body for request in server.requests], [
            {"model": "n", "temperature": 0, "stop": ["é"],
             "messages": [{"role": "user", "content": "Hi"}]},
            {"messages": talk, "model": "m"}, dict(body, seed=7), dict(body, seed=8)])
        request = server.requests[0]
        self.assertEqual((request.method, request.path), ("POST", "/v1/chat/completions"))
        expected = {"authorization": "Bearer " + KEY, "content-type": "application/json",
                    "host": "127.0.0.1:%d" % server.port,
                    "user-agent": "cometlimit/" + cometlimit.__version__}
        self.assertEqual({name: request.headers[name] for name in expected}, expected)

    def test_is_answered_by_a_completion(self):
        """It holds what the answer said and took."""
        done = self.outcome(status(503), self.slow(
            reply("yes", {"x-cometapi-request-id": "r1"}, id="c1")))
        self.assertEqual(done[:-1], ("yes", "m-2024", "stop", {
            "prompt_tokens": 2, "completion_tokens": 3}, "r1", 2, 0.5))
        self.assertEqual(done.body["id"], "c1")

    def test_may_be_awaited(self):
        """submit's Future is one for asyncio; where wait_for() gives up, it is hung up on."""
        self.real_time()
        loop, gone, records = asyncio.new_event_loop(), threading.Event(), []
        self.addCleanup(loop.close)

        async def ask(seconds):
            return await asyncio.wait_for(asyncio.wrap_future(client.submit("Hi")), seconds)
        with Server(reply("yes"), stall(gone), reply("next")) as server:
            with self.client(server, on_record=records.append) as client:
                self.assertEqual(loop.run_until_complete(ask(TIMEOUT)).text, "yes")
                with self.assertRaises(asyncio.TimeoutError):
                    loop.run_until_complete(ask(0.1))
                self.assertTrue(gone.wait(TIMEOUT))
                future = client.submit("Hi")
                self.assertIsInstance(future, concurrent.futures.Future)
                self.assertEqual(future.result(TIMEOUT).text, "next")
        self.assertEqual([(record.status, record.attempt) for record in records],
                         [(200, 1), (None, 1), (200, 1)])

    def test_can_be_cancelled_until_its_outcome_is_there(self):
        """In the line it is not sent, nor at the last moment; nobody waits for it in vain."""
        gate, ran, late = threading.Event(), [], []

        def leave(*args, **named):
            self.until(lambda: late)
            late[0].cancel()
            return leaves(*args, **named)
        leaves = urllib.request.OpenerDirector.open
        with Server(lambda _: gate.wait(TIMEOUT) and reply("a"), reply("b")) as server, \
                self.client(server) as client:
            calls = [client.submit("a")]
            server.await_requests(1)
            calls += [client.submit("x"), client.submit("b")]
            calls[1].add_done_callback(ran.append)
            self.assertEqual([calls[1].cancel(), calls[1].cancel()], [True, True])
            self.assertEqual((ran, calls[1].running()), ([calls[1]], False))
            gate.set()
            self.assertEqual([calls[at].result(TIMEOUT).text for at in (0, 2)], ["a", "b"])
            self.assertFalse(calls[0].cancel())
            with unittest.mock.patch("urllib.request.OpenerDirector.open", leave):
                late.append(client.submit("late"))
                client.__exit__(None, None, None)
        self.assertEqual([request.prompt for request in server.requests], ["a", "b"])


class AnEndpoint(Case):
    """Where requests go, and what is said there besides the body."""

    def test_may_come_from_the_environment(self):
        """White space and a byte order mark (even as 3.6 reads it in the C locale) do no harm."""
        mark = "" if sys.getfilesystemencoding() == "ascii" else "\ufeff"  # 3.6, LC_ALL=C
        with Server(forever=reply_echo) as server:
            os.environ["COMETAPI_KEY"] = mark + " %s\r\n" % KEY
            os.environ["COMETAPI_BASE_URL"] = " %s/ \n" % server.url
            self.assertEqual(cometlimit.ask_all(["1", "2"], model="m"), ["1", "2"])
            for before, after in ((" \ufeff", "\r\n"), ("\udcef\udcbb\udcbf", " \n")):
                self.client(server, api_key=before + KEY + after).ask("Hi")
        self.assertEqual([request.headers["authorization"] for request in server.requests],
                         ["Bearer " + KEY] * 4)
        del os.environ["COMETAPI_BASE_URL"]
        self.assertEqual(repr(cometlimit.Client(model="m")),
                         "<cometlimit.Client https://api.cometapi.com/v1 model='m'>")

    def test_may_have_a_query_and_headers(self):
        """They go with each attempt; headers win over ours; a login among them needs no key."""
        own = {"authorization": "Basic " + KEY, "X-Team": " a ", "user-agent": "me/1"}
        with Server(status(503), reply("yes"), reply("yes")) as server:
            url = server.url + "/?api-version=1"
            self.client(server, headers=own, base_url=url).ask("Hi")
            self.client(server, headers={"Api-Key": KEY}, base_url=url, api_key=None).ask("Hi")
        for request in server.requests:
            self.assertEqual(request.path, "/v1/chat/completions?api-version=1")
        for request in server.requests[:2]:
            self.assertEqual({name: request.headers[name.lower()] for name in own},
                             {name: value.strip() for name, value in own.items()})
        self.assertEqual(server.requests[2].headers["api-key"], KEY)
        self.assertNotIn("authorization", server.requests[2].headers)
        for name in ("Authorization", "api-key"):
            cometlimit.Client(base_url="https://h/v1", headers={name: "x"})
        with self.assertRaisesRegex(cometlimit.ConfigurationError, "no API key"):
            cometlimit.Client(base_url="https://h/v1", headers={"X-Team": "x"})

    def test_hides_what_its_headers_keep_secret(self):
        """As it hides the key, in whatever a server says."""
        secret = "hush-hush-0123"
        for name, value in (("Authorization", "Basic " + secret), ("X-Auth-Token", secret),
                            ("Cookie", secret), ("x-client-secret", secret)):
            error = self.outcome(failure("bad " + secret, 400, message="no " + secret),
                                 headers={name: value})
            self.assertEqual(error.status_code, 400)
            self.assertNotIn(secret, str(error) + repr(vars(error)), name)

    def test_needs_no_key_over_http(self):
        """Which goes to this machine or, with allow_http=True, to any other."""
        with Server(reply("yes"), reply("yes")) as server:
            for url in (server.url, server.url.replace("127.0.0.1", "0.0.0.0")):
                self.client(server, api_key=None, base_url=url).ask("Hi")
        self.assertFalse([1 for request in server.requests if "authorization" in request.headers])
        url = "http://gpu7:8000/v1"
        self.assertEqual(cometlimit.Client(base_url=url, allow_http=True).base_url, url)

    def test_follows_no_redirect(self):
        """Whatever the Location, and even with a completion for a body: one request, no more."""
        with Server() as other:
            for place, code in itertools.product((
                    "http://127.0.0.1:%d/v1", "http://localhost:%d/v1", "//127.0.0.1:%d/v1",
                    "ftp://127.0.0.1:%d/v1", "https://127.0.0.1:%d/", "/v1/other", "file:///",
                    "data:,x", "http://[::1", ""), (301, 302, 303, 307, 308)):
                line = status(code, GOOD, {"Location": place.replace("%d", str(other.port))})
                with self.subTest(code=code, place=place), Server(line) as server:
                    error = self.client(server).submit("Hi").exception(TIMEOUT)
                    self.assertIs(type(error), cometlimit.APIStatusError)
                    self.assertEqual((error.status_code, error.retryable, error.attempts,
                                      server.requests[0].method), (code, False, 1, "POST"))
        self.assertEqual(other.connections, 0)

    def test_opens_nothing_else_and_keeps_no_cookie(self):
        """No file:, ftp: or data:, even if asked; a Set-Cookie does not come back."""
        with Server(reply("a", {"Set-Cookie": "a=b; Path=/"}), reply("b")) as server:
            client = self.client(server)
            self.assertEqual([client.ask("1"), client.ask("2")], ["a", "b"])
            for url in ("file://" + cometlimit.__file__, "ftp://127.0.0.1:1/", "data:,x"):
                self.assertIsNone(client._pool.opener.open(url))
        self.assertNotIn("cookie", server.requests[1].headers)
        self.assertEqual(server.connections, 1)


class ManyQuestions(Case):
    """map and ask_all."""

    def test_are_answered_in_order_by_no_more_than_max_concurrency(self):
        """Whatever fails or overtakes: in the prompts' order; retries count as in flight."""
        self.fast_clock()
        prompts = [str(number) for number in range(60)]
        for bound in (1, 3):
            gate, failed = threading.Barrier(bound), set()

            def line(request):
                if len(server.requests) <= bound:
                    gate.wait(TIMEOUT)   # all of them are here
                    time.sleep(0.05)     # room for one too many
                number = int(request.prompt)
                if number % 3 or number in failed:
                    return reply_echo(request)
                failed.add(number)
                return status(429, headers={"Retry-After": "1"}) if number % 2 else cut_short()
            with self.subTest(bound=bound), Server(forever=line) as server:
                with self.client(server, max_concurrency=bound) as client:
                    done = list(client.map(prompts))
                self.assertEqual([one.text for one in done], prompts)
                self.assertEqual([one.attempts for one in done], [2, 1, 1] * 20)
                self.assertEqual(server.peak, bound)

    def test_may_be_asked_in_one_line(self):
        """ask_all takes a Client's options, and hands all else on; failures may be values."""
        def line(request):
            return status(400) if request.prompt == "bad" else reply_echo(request)
        with Server(forever=line) as server:
            options = dict(api_key=KEY, base_url=server.url, model="m", max_concurrency=1)
            self.assertEqual(cometlimit.ask_all(iter("ab"), temperature=0, **options), ["a", "b"])
            self.assertEqual(set(server.requests[0].body), {"model", "temperature", "messages"})
            got = cometlimit.ask_all(["a", "bad", 5], return_exceptions=True, **options)
            self.assertEqual([getattr(one, "status_code", one) for one in got], ["a", 400, None])
            with self.assertRaises(cometlimit.APIStatusError):
                cometlimit.ask_all(["bad", "a"], **options)

    def test_may_be_endless(self):
        """16 x max_concurrency are taken ahead of a slow answer; what was yielded is forgotten."""
        taken, done = [], reply("x" * 50000)

        def line(request):
            if request.prompt == "100":
                self.until(lambda: len(taken) >= 130)
                time.sleep(0.05)  # room for more
            return done

        def source():
            for number in itertools.count():
                if number == 4:
                    server.await_requests(4)  # so the first answer is there
                taken.append(number)
                yield str(number)
        with Server(forever=line) as server:
            with self.client(server, max_concurrency=2) as client:
                answers = client.map(source())
                self.assertEqual(taken, [])
                gc.collect()
                tracemalloc.start()
                self.addCleanup(tracemalloc.stop)
                for number in range(300):
                    next(answers)
                    self.assertLessEqual(len(taken), number + 1 + (32 if number else 8))
                self.assertLess(tracemalloc.get_traced_memory()[1], 50000 * 300 / 3)
                answers.close()

    def test_stop_when_their_loop_is_left(self):
        """What is in flight is hung up on, nothing more is taken or sent; the client lives on."""
        gone, taken = [threading.Event() for _ in range(3)], itertools.count()

        def line(request):
            if request.prompt == "0":  # an answer earlier than the next prompts would be yielded
                server.await_requests(3)
            return reply_echo(request) if request.prompt in ("0", "after") else (
                stall(gone[int(request.prompt) - 1]))
        with Server(forever=line) as server:
            with self.client(server, max_concurrency=3) as client:
                for _ in client.map(str(number) for number in taken):
                    break
                self.assertLessEqual(next(taken), 2 * 3 + 1)
                for event in gone[:2]:
                    self.assertTrue(event.wait(TIMEOUT))
                self.assertEqual(client.ask("after"), "after")
            self.assertEqual({request.prompt for request in server.requests} - {"3"},  # no more
                             {"0", "1", "2", "after"})

    def test_fail_each_in_its_turn(self):
        """After the answers before it, or as a value; what the source raises is never one."""
        def line(request):
            return status(400) if request.prompt == "2" else reply_echo(request)

        def source():
            yield from ["0", "1", "2", [], 5, "4"]
            raise KeyError("disk")
        bad = cometlimit.ConfigurationError
        for values, expected, last in (
                (False, ["0", "1"], cometlimit.APIStatusError),
                (True, ["0", "1", cometlimit.APIStatusError, bad, bad, "4"], KeyError)):
            with self.subTest(return_exceptions=values), Server(forever=line) as server:
                with self.client(server, max_concurrency=3) as client:
                    got = []
                    with self.assertRaises(last):
                        for done in client.map(source(), return_exceptions=values):
                            got.append(getattr(done, "text", type(done)))
            self.assertEqual(got, expected)

    def test_may_come_from_many_threads(self):
        """A callback may submit; the end of the with block waits for the last of them to end."""
        self.fast_clock()
        texts, lock = [], threading.Lock()

        def note(call):
            time.sleep(0.1 if call.result().text == "f4'" else 0.0)
            with lock:
                texts.append(call.result().text)

        def again(call):
            client.submit(call.result().text + "'").add_done_callback(note)
            note(call)
        with Server(status(503), forever=reply_echo) as server:
            with self.client(server, max_concurrency=3) as client:
                threads = [threading.Thread(target=lambda name=name: [
                    client.submit(name + str(number)).add_done_callback(again)
                    for number in range(5)]) for name in "abcdef"]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join(TIMEOUT)
            expected = [name + str(number) for name in "abcdef" for number in range(5)]
            self.assertEqual(sorted(texts), sorted(expected + [text + "'" for text in expected]))


class AFailure(Case):
    """Which answers are tried again, by status and by body."""

    def check(self, again, line, **options):
        done = self.outcome(line, *[reply("yes")] * again, **options)
        self.assertEqual((getattr(done, "text", None), done.attempts),
                         ("yes", 2) if again else (None, 1), repr(done))
        if not again:
            self.assertFalse(done.retryable)
        return done

    def test_is_judged_by_its_status(self):
        """Each status of the table is tried again, no other one is."""
        retried = RETRIED | {498}  # Groq's
        for code in sorted(retried | set(GIVEN_UP)):
            with self.subTest(code=code):
                self.check(code in retried, status(code, headers={"Location": "/v1/other"}))

    def test_is_judged_by_its_meaning(self):
        """One of each kind, all the way: the tables are below."""
        half = {"message": {"content": "half"}, "finish_reason": "error"}
        for again, line in (
                (False, failure("model_not_found", 503)), (False, failure("quota_exceeded", 429)),
                (True, failure("", 429, type="invalid_request_error")),
                (False, failure("x", 429, message="Limit 10, Requested 20")),
                (True, status(400, headers={"x-should-retry": "true"})),
                (True, status(200, {"base_resp": {"status_code": 1002}})),
                (True, HANG_UP), (True, RESET), (True, cut_short()), (True, cut_short(503)),
                (False, cut_short(400)),
                (True, status(200, {"choices": [half]})), (True, status(200, {"choices": []})),
                (False, status(200, "<html>hi</html>")), (True, cut_short(body=b"<html>"))):
            with self.subTest(again=again, line=line):
                self.check(again, line)
        self.assertEqual(self.outcome(*[status(200, {"choices": []})] * 2).attempts, 2)
        with Server() as server:
            pass  # nobody listens
        error = self.client(server, max_retries=2).submit("Hi").exception(TIMEOUT)
        self.assertEqual((type(error), error.attempts), (cometlimit.APIConnectionError, 3))

    def test_of_money_is_doubted_after_an_answer(self):
        """Some throttles say so for a second or two: within a minute of an answer."""
        money = failure("insufficient_quota", 429)
        for seconds, texts in ((59.0, ["one", "two"]), (61.0, ["one", None])):
            with Server(reply("one"), money, *[reply("two")] * (seconds < 60)) as server:
                client, found = self.client(server), []
                for _ in range(2):
                    try:
                        found.append(client.ask("Hi"))
                    except cometlimit.RateLimitError as error:
                        found.append(error.retryable or None)
                    self.now += seconds
                with self.subTest(seconds=seconds):
                    self.assertEqual(found, texts)

    def test_ends_after_max_retries(self):
        """attempts = max_retries + 1, 5 by default, with a Record of each."""
        for options, attempts in (({}, 5), ({"max_retries": 0}, 1), ({"max_retries": 2}, 3)):
            with self.subTest(**options):
                error = self.outcome(*[status(503)] * attempts, **options)
                self.assertEqual([record.attempt for record in error.records],
                                 list(range(1, attempts + 1)))
                self.assertEqual((error.attempts, error.retryable), (attempts, True))

    def test_says_what_happened(self):
        """Each class has its text, with the server's words, and its details."""
        said = {"message": "Slow down (request id: a) (request id: b)", "type": "requests",
                "param": "p", "code": "rate_limit_exceeded"}
        error = self.outcome(status(429, {"error": said}, {"Retry-After": "7"}), max_retries=0)
        self.assert_error(error, cometlimit.RateLimitError,
                          "HTTP 429 rate_limit_exceeded: " + said["message"], status_code=429,
                          retry_after=7.0, request_id="b", body={"error": said}, attempts=1, **said)
        page = "a web page from %s/chat/completions: check the base URL (is /v1 missing?): "
        refused, nothing = cometlimit.APIStatusError, cometlimit.APIResponseError
        for line, kind, text in (
                (status(500), refused, "500: an empty body"), (status(200), nothing,
                                                               "200: an empty body"),
                (status(502, "<h1>Bad\n gateway</h1>"), refused, "502: <h1>Bad gateway</h1>"),
                (status(302, headers={"Location": "http://127.0.0.1:1/"}), refused,
                 "302: a redirect, which is not followed: check the base URL"),
                (status(200, "<html>"), nothing, "200: " + page + "<html>"),
                (status(200, "hi", {"Content-Type": "text/html"}), nothing, "200: " + page + "hi"),
                (status(200, {}), nothing, "200: an answer without choices: {}"),
                (status(200, "data: [DONE]\n\n"), nothing,
                 "200: a stream without a finish_reason: data: [DONE]")):
            with self.subTest(text=text), Server(line) as server:
                with self.assertRaises(cometlimit.Error) as caught:
                    self.client(server, max_retries=0).ask("Hi")
                self.assert_error(caught.exception, kind, "HTTP " + text.replace(
                    "%s", server.url), retry_after=None, attempts=1)

    def test_is_an_answer_that_will_not_do_for_check(self):
        """False or an exception is a no: tried again, no sign of load; the error has the answer."""
        told, records = [], []
        self.throttle(refused=lambda *args: told.append(args))
        for value in (True, None, 0, ""):
            self.assertEqual(self.outcome(reply("yes"), check=lambda _: value).attempts, 1)
        done = self.outcome(reply("{"), reply("false"), reply("null"), on_record=records.append,
                            check=lambda completion: json.loads(completion.text))
        self.assertEqual((done.text, done.attempts), ("null", 3))
        self.assertEqual([(record.status, record.error, record.completion_tokens)
                          for record in records], [(200, "check_failed", 3)] * 2 + [(200, None, 3)])
        error = self.outcome(*[reply("bad", {"x-request-id": "r1"})] * 5,
                             check=lambda completion: 1 / 0)
        self.assertEqual((type(error), error.code, error.attempts, error.retryable,
                          error.status_code, error.request_id), (
            cometlimit.APIResponseError, "check_failed", 5, True, 200, "r1"))
        self.assertRegex(str(error), "check: ZeroDivisionError: division by zero")
        self.assertEqual(error.body["choices"][0]["message"]["content"], "bad")
        self.assertEqual(told, [])


class AWait(Case):
    """How long until the next attempt."""

    def test_doubles_from_a_second(self):
        """By chance 25 % less or more, and never over max_delay."""
        table = {0.0: (0.75, 1.5, 3.0, 6.0, 12.0, 18.0, 18.0),
                 0.5: (1.0, 2.0, 4.0, 8.0, 16.0, 24.0, 24.0),
                 1.0: (1.25, 2.5, 5.0, 10.0, 20.0, 30.0, 30.0)}
        for chance, waits in table.items():
            for attempt, wait in zip((1, 2, 3, 4, 5, 6, 1104), waits):
                with self.subTest(chance=chance, attempt=attempt):
                    self.assertEqual(cometlimit.backoff(attempt, random=lambda: chance), wait)
        for hint, low, high in ((20, 20.0, 20.5), (0.2, 0.75, 1.25), (29.9, 29.9, 30.0),
                                (60, 30.0, 30.0), (float("inf"), 30.0, 30.0)):
            with self.subTest(hint=hint):
                self.assertEqual(cometlimit.backoff(1, hint, 30.0, lambda: 0.0), low)
                self.assertEqual(cometlimit.backoff(1, hint, 30.0, lambda: 1.0), high)
        for most, hint in itertools.product((0.001, 1, 2.5, 1000), (None, 0.5, 5, 1e9)):
            self.assertLessEqual(cometlimit.backoff(9, hint, most, lambda: 1.0), most)

    def test_is_kept_by_the_client(self):
        """Exactly its backoff, or what is asked for in headers or words, cut at max_delay."""
        for headers, options, waits in (
                ({}, {}, [1.0, 2.0, 4.0, 8.0]), ({}, {"max_delay": 2}, [1.0, 1.6, 1.6, 1.6]),
                ({}, {"max_retries": 1}, [1.0]), (None, {}, [7.25, 7.5, 8.0, 9.0]),
                ({"Retry-After": "20"}, {}, [20.25, 20.5, 21.0, 22.0]),
                ({"retry-after-ms": "5500"}, {}, [5.75, 6.0, 6.5, 8.0]),
                ({"Retry-After": "59"}, {"max_retries": 2}, [30.0])):
            body = "" if headers else {"error": {"message": "Please try again in 7s."}}
            line = HANG_UP if headers == {} else status(503, body, headers or {})
            with self.subTest(headers=headers, **options):
                error = self.outcome(*[line] * (len(waits) + 1), **options)
                self.assertEqual(error.attempts, len(waits) + 1)
                self.assertEqual([round(wait, 6) for wait in self.waits], waits)

    def test_is_none_where_it_would_be_in_vain(self):
        """A wish beyond what all attempts left can wait fails at once, and names the hour."""
        for asked, options, attempts in (
                ("61", {"max_retries": 2}, 1), ("59", {"max_retries": 2}, 3), ("121", {}, 1),
                ("3", {"max_delay": 1, "max_retries": 2}, 1), ("27780", {}, 1),
                ("31", {"max_retries": 0}, 1)):
            lines = [status(429, "slow", {"Retry-After": asked})] + [status(429)] * (attempts - 1)
            with self.subTest(asked=asked, **options):
                error = self.outcome(*lines, **options)
                self.assertEqual((error.attempts, error.retryable), (attempts, True))
                back = time.strftime("%H:%M", time.localtime(self.START + float(asked)))
                self.assertEqual(str(error).endswith("; come back at " + back), attempts == 1)


# The tables: what _understand, which is pure, makes of bytes and headers. Through a server
# each row would take a hundred times as long; one of each kind goes that way above.


class Understood(Case):
    """What the classes below share."""

    URL = "https://example.com/v1/chat/completions"

    def understand(self, code=200, body=b"", headers=(), cut="", streamed=True):
        message = cometlimit.http.client.HTTPMessage()
        for name, value in headers.items() if isinstance(headers, dict) else headers:
            message[name] = value
        if not isinstance(body, bytes):
            body = (body if isinstance(body, str) else json.dumps(body)).encode()
        return cometlimit._understand(cometlimit._Answer(code, message, body, cut),
                                      cometlimit._hider(KEY), self.URL, streamed)

    def text(self, *answer, **options):
        return getattr(self.understand(*answer, **options).outcome, "text", None)

    def judged(self, *answer, **options):
        """How many attempts a failure deserves, and the load that it shows."""
        verdict = self.understand(*answer, **options)
        self.assertIsInstance(verdict.outcome, cometlimit.Error, verdict)
        self.assertEqual(verdict.outcome.retryable, verdict.tries > 1)
        return verdict.tries, verdict.load

    def asked(self, *answer):
        seconds = self.understand(*answer).outcome.retry_after
        return seconds if seconds is None else round(seconds, 6)


FOREVER = math.inf
ALL = json.dumps({"model": "m-1", "usage": {"prompt_tokens": 9}, "choices": [
    {"index": 0, "message": {"role": "assistant", "content": "all"},
     "finish_reason": "stop"}]}).encode()


def chunk(delta=None, finish=None, index=0, **fields):
    return dict({"id": "c", "object": "chat.completion.chunk", "created": 7, "model": "m-1",
                 "choices": [{"index": index, "delta": delta or {}, "finish_reason": finish}]},
                **fields)


def events(*values, end="data: [DONE]\n\n"):
    return "".join("data: %s\n\n" % (value if isinstance(value, str) else json.dumps(value))
                   for value in values) + end


HEL, LO, STOP = chunk({"content": "Hel"}), chunk({"content": "lo"}), chunk(finish="stop")


class APaidAnswer(Understood):
    """Is read if it can be read."""

    def test_is_read_whatever_it_is_wrapped_in(self):
        """Compression that nobody asked for, marks, white space, a list, NaN, a cut-off end."""
        packed = zlib.compress(ALL)
        head = b'{"choices": [{"message": {"content": "all"}}], "x": %s}'
        zipped = gzip.compress(ALL)
        for body, encoding in (
                (ALL, ""), (zipped, "gzip"), (zipped, ""), (zipped, "X-GZip"), (packed, "deflate"),
                (packed[2:-4], "deflate"), (ALL, "gzip"), (ALL, "deflate"), (BOM + ALL, ""),
                (zipped + b"\0" * 99, "gzip"), (zipped[:-8], "gzip"), (b" \r\n" + ALL + b"\n", ""),
                (b"[" + ALL + b"]", ""), (gzip.compress(b"\n" + BOM + ALL), "gzip"),
                (head % b"[NaN, -Infinity]", ""), (head % b'1, "code": 429', ""),
                (head % b'1, "base_resp": {"status_code": 0}', ""), (gzip.compress(events(
                    chunk({"content": "all"}), STOP).encode()), "gzip")):
            with self.subTest(body=body, encoding=encoding):
                for cut in ("", "reset"):
                    self.assertEqual(self.text(200, body, {"Content-Encoding": encoding}, cut),
                                     "all")
        body = self.understand(200, head % b"[NaN, -Infinity]").outcome.body
        self.assertEqual(body["x"], [None, None])

    def test_has_a_text_in_every_form(self):
        """A string, null, parts; and its other fields."""
        for content, text in (
                ("a", "a"), (None, ""), ([], ""), (5, ""), ([{"type": "thinking"}], ""),
                ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ab")):
            with self.subTest(content=content):
                self.assertEqual(self.text(200, {"choices": [{"message": {
                    "content": content}}]}), text)
        done = self.understand(200, ALL, {"x-request-id": "r"}).outcome
        self.assertEqual(done, ("all", "m-1", "stop", {"prompt_tokens": 9}, "r", 1, 0.0,
                                json.loads(ALL.decode())))

    def test_is_bought_again_only_where_that_may_help(self):
        """What came whole would come again."""
        half = {"index": 0, "message": {"content": "half"}}
        for verdict, bodies in (
                ((FOREVER, None), (
                    "", "  ", gzip.compress(ALL)[:50], {"error": "busy"}, {"error": {"code": 408}},
                    {"choices": [half], "error": {"message": "busy"}},
                    {"choices": [dict(half, finish_reason="error")]}, {"code": 1302, "msg": "x"},
                    {"base_resp": {"status_code": 1000}})),
                ((FOREVER, 429), (
                    {"error": {"code": 429}}, {"error": {"code": "rate_limit_exceeded"}},
                    {"choices": [dict(half, error={"code": "429"})]}, {"code": 429, "msg": "x"},
                    {"error": {"code": 429, "type": "invalid_request_error"}},
                    {"base_resp": {"status_code": 1002, "status_msg": "rate"}})),
                ((FOREVER, 503), ({"error": {"code": "503"}}, [{"error": {"code": 503}}],
                                  {"choices": [half, dict(half, error={"code": 503})]})),
                ((2, None), ({}, {"choices": None}, {"choices": [{}]}, {"choices": [None]},
                             {"choices": 5}, {"choices": {"a": 1}}, {"code": 200, "data": {}},
                             {"choices": [{"message": None}]})),
                ((1, None), (
                    "hi", '{"choices": [', "<html>hi</html>", [], "null", "[1,2]", "[" * 100000,
                    {"choices": [dict(half, error={"code": 403})]}, {"error": {"code": 400}},
                    {"error": {"code": "insufficient_quota"}}, {"code": "401", "msg": "no"},
                    {"error": {"type": "invalid_request_error"}},
                    {"base_resp": {"status_code": 1008}, "choices": None},
                    {"base_resp": {"status_code": 1004}}))):
            for body in bodies:
                with self.subTest(body=str(body)[:70]):
                    self.assertEqual(self.judged(200, body), verdict)
                    self.assertIs(type(self.understand(200, body).outcome),
                                  cometlimit.APIResponseError)
        for body in ("", '{"choices": [', "<html>h", ALL[:-1]):
            self.assertEqual(self.judged(200, body, cut="reset"), (FOREVER, None))

    def test_is_bounded(self):
        """No bomb costs memory or a second payment; nothing takes the square of its length."""
        with unittest.mock.patch.object(cometlimit, "_MAX_ANSWER", 1 << 20):
            bomb = gzip.compress(b" " * (1 << 26))
            tracemalloc.start()
            start = time.monotonic()
            for body in (bomb, b"x" * (1 << 21), gzip.compress(b"") * 200000):
                self.understand(200, body)
            self.assertLess(time.monotonic() - start, 3.0)
            self.assertLess(tracemalloc.get_traced_memory()[1], 32 << 20)
            tracemalloc.stop()
            self.assertEqual(self.judged(200, b"data:" * (1 << 20)), (1, None))
        for body in ("[1e999]", "9" * 60000, "[" * 60000):
            self.assertEqual(self.understand(500, body).outcome.body[:1], body[0])
        slow = (events(*["{}"] * 100000), "data:" * 300000, "wait " * 13000 + "1s",
                "wait 1" + " " * 65000, "\\" * 65000, "(request id: " * 5000, "retry " * 10000,
                events(*[chunk({"content": "abcd"})] * 30000 + [STOP]), "limit: 1 " * 10000,
                '{"error": {"message": "%s"}}' % ("{" * 60000), "retry in " + "1s " * 20000,
                "9" * 1000000, "[" * 4000000)
        for body, code in itertools.product(slow, (200, 429)):
            start = time.monotonic()
            self.understand(code, body)
            self.assertLess(time.monotonic() - start, 3.0, body[:30])


class AStreamOfEvents(Understood):
    """Amounts to the answer that would have come at once."""

    def test_is_put_together_to_the_same_body(self):
        """Texts, tool calls by their index, usage from the last chunk, several choices."""
        usage = {"prompt_tokens": 9, "completion_tokens": 3}
        call = {"index": 0, "id": "a", "type": "function", "function": {"name": "f",
                                                                        "arguments": ""}}
        other = {"index": 1, "id": "b", "type": "function", "function": {
            "name": "g", "arguments": "{}"}}
        done = self.understand(200, events(
            chunk({"role": "assistant", "content": ""}, system_fingerprint="fp"),
            chunk({"role": "assistant", "reasoning_content": "th"}),
            chunk({"reasoning_content": "ink"}), chunk({"refusal": "n"}), chunk({"refusal": "o"}),
            chunk({"x_new": "1"}), chunk({"x_new": "2"}), HEL, LO,
            chunk({"content": "b"}, "length", 1), chunk({"tool_calls": [call, other]}),
            chunk({"tool_calls": [{"index": 0, "function": {"arguments": '{"a"'}}]}),
            chunk({"tool_calls": [dict(call, function={"name": "f", "arguments": ": 1}"})]}),
            chunk({"function_call": {"name": "h", "arguments": "{"}}),
            chunk({"function_call": {"arguments": "}"}}),
            chunk(finish="tool_calls"), dict(chunk(usage=usage), choices=[]))).outcome
        self.assertEqual(done.body, {
            "id": "c", "object": "chat.completion", "created": 7, "model": "m-1",
            "system_fingerprint": "fp", "usage": usage, "choices": [{
                "index": 0, "finish_reason": "tool_calls", "message": {
                    "role": "assistant", "content": "Hello", "reasoning_content": "think",
                    "refusal": "no", "x_new": "12", "tool_calls": [
                        {"id": "a", "type": "function",
                         "function": {"name": "f", "arguments": '{"a": 1}'}},
                        {"id": "b", "type": "function",
                         "function": {"name": "g", "arguments": "{}"}}],
                    "function_call": {"name": "h", "arguments": "{}"}}},
                {"index": 1, "finish_reason": "length", "message": {"content": "b"}}]})
        self.assertEqual((done.text, done.usage, done.finish_reason),
                         ("Hello", usage, "tool_calls"))

    def test_keeps_apart_what_belongs_apart(self):
        """Choices and their logprobs; Gemini's calls, all of index 0, or of none."""
        def part(index, text, finish=None):
            event = chunk({"content": text}, finish, index)
            event["choices"][0]["logprobs"] = {"content": [{"token": text}]}
            return event
        done = self.understand(200, events(part(10, "b"), part(2, "a"), part(10, "B", "stop"),
                                           part(2, "A", "length"))).outcome
        self.assertEqual(done.body["choices"], [
            {"index": index, "message": {"content": a + b}, "finish_reason": end,
             "logprobs": {"content": [{"token": a}, {"token": b}]}}
            for index, a, b, end in ((2, "a", "A", "length"), (10, "b", "B", "stop"))])
        for index in ({"index": 0}, {}):
            calls = [dict({"id": name, "function": {"name": name}}, **index) for name in "ab"]
            done = self.understand(200, events(*[chunk({"tool_calls": [call]}) for call in calls]
                                               + [STOP])).outcome
            self.assertEqual(done.body["choices"][0]["message"], {"content": None, "tool_calls": [
                {"id": name, "function": {"name": name}} for name in "ab"]})

    def test_is_read_in_every_form(self):
        """Line ends, heartbeats, names, no [DONE], a cut behind the finish_reason."""
        hello = events(HEL, LO, STOP)
        for body in (
                hello, "\ufeff" + hello, "\n \n" + hello, events(HEL, LO, STOP, end="")[:-2],
                hello.replace("\n", "\r\n"), hello.replace("\n", "\r"),
                hello.replace("data: ", "data:"), hello.replace("\n\n", "\n"),
                ": ping\n\n" + hello.replace("\n\n", "\n\n: ping\n\ndata:\n\n"),
                hello.replace("data:", "event: message\nid: 1\nretry: 5\ndata:"),
                events(HEL, "keep-alive", LO, STOP), events(HEL, LO, STOP, chunk()),
                events({"choices": [{"delta": None, "message": {"content": "Hello"},
                                     "finish_reason": "stop"}]}),
                events(HEL, LO, STOP, chunk(finish="")), events(dict(HEL, error=None), LO, STOP),
                events({"choices": [{"message": {"content": "Hello"}, "finish_reason": "stop"}]}),
                events(*[{"choices": [{"delta": {"content": text}, "finish_reason": end}]}
                         for text, end in (("Hel", None), ("lo", "stop"))])):
            with self.subTest(body=body):
                self.assertEqual(self.text(200, body), "Hello")
        whole = events(HEL, LO, STOP, dict(chunk(usage={"a": 1}), choices=[]))
        for cut in range(whole.index('"stop"') + 10, len(whole), 7):
            self.assertEqual(self.text(200, whole[:cut], cut="reset"), "Hello", whole[:cut])

    def test_is_a_failure_without_its_end(self):
        """[DONE] proves nothing where a stream was asked for; each choice has to be finished."""
        for body, unasked in (
                (events(HEL, LO), "Hello"), (events(HEL, end=""), None),
                (events(HEL, chunk({"content": "x"}, index=1), STOP, end=""), None),
                (events(HEL, '{"choices": [{"delta": {"con', STOP, end=""), None)):
            with self.subTest(body=body):
                self.assertEqual(self.judged(200, body), (FOREVER, None))
                self.assertEqual(self.text(200, body, streamed=False), unasked)

    def test_ends_with_the_error_in_it(self):
        """At the top, in the choice, or in an event of this name: by its code."""
        inner = chunk()
        inner["choices"][0]["error"] = {"code": 400, "message": "no"}
        for body, verdict in (
                (events(HEL, {"error": {"code": 429, "message": "slow"}}), (FOREVER, 429)),
                (events(HEL, {"error": "busy"}), (FOREVER, None)),
                (events(HEL, chunk(finish="error", error={"code": 502})), (FOREVER, 502)),
                (events(HEL, chunk(finish="error")), (FOREVER, None)),
                (events(HEL, inner, STOP), (1, None)),
                (events({"error": {"code": "model_not_found"}}), (1, None)),
                ('event: error\ndata: {"code": "503", "message": "x"}\n\n', (FOREVER, 503)),
                ('event: error\r\ndata: {"type": "error", "error": {"type": '
                 '"overloaded_error", "message": "Overloaded"}}\r\n\r\n', (FOREVER, None)),
                (events(HEL, STOP, end="event: error\ndata: broken\n\n"), (FOREVER, None)),
                (events({"code": 401, "message": "no"}), (1, None))):
            with self.subTest(body=body):
                self.assertEqual(self.judged(200, body), verdict)


class ARefusal(Understood):
    """Is judged by its meaning, and asks for a wait in many ways."""

    def test_is_judged_by_its_code_or_type(self):
        """Permanent words whatever the status; with 429 only those of money or of no model."""
        for word in sorted(set(PERMANENT) | cometlimit.PERMANENT):
            lasting = word in cometlimit.MONEY or re.match("billing_|model_not|unsupp", word)
            for error in ({"code": word}, {"type": word, "code": ""}, {"code": word.upper()}):
                with self.subTest(error=error):
                    for code in (200, 500, 503):
                        self.assertEqual(self.judged(code, {"error": error}), (1, None))
                    self.assertEqual(self.judged(429, {"error": error}),
                                     (1, None) if lasting else (FOREVER, 429))
        for code, name, param, tries in (
                (401, "", "", 1), (403, "", "", 1), (413, "read_request_body_failed", "", 1),
                (500, "get_channel_failed", "", FOREVER), (501, "api_not_implemented", "", 1),
                (429, "upstream_error", "", FOREVER), (429, 1302, "", FOREVER), (429, 1113, "", 1),
                (400, "rate_limit_exceeded", "", 1), (529, "overloaded", "", FOREVER),
                (500, "bad_response_status_code", "429", FOREVER),
                (500, "bad_response_status_code", "400", 1),
                (500, "bad_response_status_code", "\u00b2", FOREVER)):
            with self.subTest(code=code, name=name, param=param):
                self.assertEqual(self.judged(
                    code, {"error": {"code": name, "param": param}})[0], tries)
        for code, hint, verdict in (
                (400, "true", (FOREVER, None)), (400, "True", (1, None)), (400, "1", (1, None)),
                (429, "false", (1, None)), (200, "false", (1, None)), (408, "", (FOREVER, None)),
                (503, "False", (FOREVER, 503)), (429, "true", (FOREVER, 429))):
            with self.subTest(code=code, hint=hint):
                self.assertEqual(self.judged(code, "no", {"x-should-retry": hint}), verdict)

    def test_is_permanent_where_the_request_exceeds_the_limit(self):
        """Limit and Requested are compared; a limit that is used up may pass."""
        for message, tries in (
                ("Request too large for m on tokens per min (TPM): Limit 10000, Requested 44975."
                 " The input or output tokens must be reduced", 1), ("Request too large", 1),
                ("Limit 10,000, Requested 44,975", 1), ("Limit: 9.999, Requested: 10.000", 1),
                ("Limit 10000, Used 9000, Requested 2000. Try again in 6s", FOREVER),
                ("Request too large: Limit 10000, Requested 10000", FOREVER),
                ("Limit 7000, Used 0, Requested ~12903.", 1), ("Rate limit reached", FOREVER),
                ("exceed your rate limit of 30,000 input tokens per minute", FOREVER)):
            with self.subTest(message=message):
                body = {"error": {"message": message, "code": "rate_limit_exceeded"}}
                self.assertEqual(self.judged(429, body), (tries, 429 if tries > 1 else None))

    def test_has_its_words_wherever_they_stand(self):
        """Objects, texts, lists, one within the other: the innermost are the plainest."""
        inner = {"error": {"code": "RateLimitReached", "message": "Slow"}}
        for body, code, type_, param, message in (
                ({"error": {"code": 7, "type": "t", "param": "p", "message": "m"}},
                 "7", "t", "p", "m"), ({"error": "m"}, None, None, None, "m"),
                ({"error": "Bad", "message": "m", "status": 503}, None, None, None, "m"),
                ([{"error": {"message": "m", "code": 503}}], "503", None, None, "m"),
                ({"message": "m", "code": "c", "type": "t", "param": "p"}, "c", "t", "p", "m"),
                ({"type": "error", "error": {"type": "t", "message": "m"}}, None, "t", None, "m"),
                ({"error": {"message": "m"}, "code": "c"}, "c", None, None, "m"),
                ({"error": {"error": {"message": "m", "code": "c"}}}, "c", None, None, "m"),
                ({"detail": "m"}, None, None, None, "m"),
                ({"detail": [{"loc": ["body"], "msg": "m", "type": "t"}]}, None, "t", None, "m"),
                ({"errors": [{"message": "m", "code": 5}]}, "5", None, None, "m"),
                ({"base_resp": {"status_code": 1002, "status_msg": "m"}}, "1002", None, None, "m"),
                ({"error": {"type": "t", "message": json.dumps(inner)}},
                 "RateLimitReached", "t", None, "Slow"),
                ({"error": {"message": "Azure: " + json.dumps(inner)}},
                 "RateLimitReached", None, None, "Slow"),
                ({"error": {"message": "not {json"}}, None, None, None, "not {json"),
                ({"error": {"code": None, "message": None, "type": {}}}, None, None, None, None),
                ("m", None, None, None, None), ([], None, None, None, None)):
            with self.subTest(body=body):
                error = self.understand(500, body).outcome
                self.assertEqual((error.code, error.type, error.param, error.message),
                                 (code, type_, param, message))

    def test_asks_in_its_headers(self):
        """Seconds, milliseconds, three forms of date by the server's clock, Unix times."""
        day, zone = "Fri, 29 Sep 2023 ", os.environ.get("TZ")
        table = [("20", 20), ("1.5", 1.5), (" 7 ", 7), ("27780", 27780), ("2678400", 2678400)] + [
            (value, None) for value in (
                "0", "-10", "2678401", "9" * 35, "9" * 400, "1e400", "inf", "nan", "+5", "1e1",
                "1_0", "", "abc", "\xb2", day + "16:26:37 GMT", day + "16:26:27 GMT",
                "Fri, 29 Sep 2033 16:26:57 GMT", "Fri, 29 Sep 100000 16:26:57 GMT",
                "2023-09-29T16:26:57Z", "Sun, 06 Nov 2094 1.2.3.4 GMT",
                "%d" % (self.START - 30), "%d" % (self.START + 40 * 86400))] + [
            (value, 20) for value in (
                day + "16:26:57 GMT", "Friday, 29-Sep-23 16:26:57 GMT", "Fri Sep 29 16:26:57 2023",
                "Zun, 29 Sep 2023 16:26:57 GMT", day + "16:26:57 -0000",
                "%d" % (self.START + 20), "%d" % (self.START * 1000 + 20000))]
        self.addCleanup(time.tzset)
        self.addCleanup(lambda: (os.environ.pop("TZ"), zone and os.environ.update(TZ=zone)))
        for os.environ["TZ"], skew in (("UTC0", 0), ("IST-2", 3600), ("EST+5", -3600)):
            time.tzset()
            self.wall = self.START + skew
            date = {"Date": day + "16:26:37 GMT"} if skew else {}
            for value, seconds in table:
                with self.subTest(value=value, skew=skew):
                    self.assertEqual(self.asked(503, "", dict(date, **{
                        "Retry-After": value})), seconds)
        slow, many = {"error": {"message": "Please try again in 20s."}}, "retry-after"
        for body, seconds, pairs in (
                ("", 5, [(many, "1"), (many, "5")]), ("", 5, [(many, "x"), (many, "5")]),
                ("", 0.5, [("retry-after-ms", "500")]), (slow, 20, [(many, "5")]),
                ("", 9, [("retry-after-ms", "-5"), (many, "9")]), (slow, 50, [(many, "50")]),
                (slow, 20, [(many, "9999999")])):
            with self.subTest(pairs=pairs, body=body):
                self.assertEqual(self.asked(429, body, pairs), seconds)

    def test_asks_in_words(self):
        """As real servers have sent them."""
        for message, seconds in (
                ("Rate limit reached. Please try again in 20s.", 20), ("Retry after 6 seconds", 6),
                ("try again in 1.2s. Visit https://x.com/1 to", 1.2), ("retry after 6", 6),
                ("try again in 7m12s. Need more tokens?", 432), ("Retry-After: 12", 12),
                ("Please try again in 350ms.", 0.35), ("Please try again in 7h43m.", 27780),
                ("Please try again in 6m0s.", 360), ("try again in 1h2m3.5s", 3723.5),
                ("try again in 2 minutes", 120), ("Try again in 60 seconds", 60),
                ("try again in 1 minute and 30 seconds", 90), ("try again in 1m 30s", 90),
                ("try again in 1 hour, 5 mins", 3900), ("try again after 60 seconds", 60),
                ("Please retry after 33 seconds. Go here: https://aka.ms/x", 33),
                ("Retry after 20.", 20), ("retry after approximately 86460 seconds.", 86460),
                ("Limit of 50 per 60s exceeded. Please wait 1 seconds before retrying.", 1),
                ("wait 30 seconds", 30), ("Please wait for 2.5 seconds", 2.5), ("retry in 5s", 5),
                ("please wait at least 5 minutes", 300), ("Retry in: 3 sec", 3),
                ("Please retry in 37.123456s.", 37.123456), ("retrying. wait **20s**", 20),
                ("Please retry your request in 10 seconds", 10), ("TRY AGAIN IN 5S", 5),
                ("Monthly limit reached. Resets in 16 days.", 16 * 86400), ("in 9s", None),
                ("Your quota will reset after 6h3m25s.", 21805), ("Try again in 1 day", 86400),
                ("wait 5s ... or wait 9s", 9), ("Please try again later.", None),
                ("Please wait a moment", None), ("Limit 20, Used 19, max retries 3", None),
                ("retry 3 times", None), ("try again in 0s", None), ("try again in 90 days", None),
                ("Retry after 2026-01-01 00:00:00", None), ("wait until 12:30", None),
                ("wait -1s", None), ("available for 30 days", None), ("waited 30s", None),
                ("retry 3 models", None), ("connection reset after 30s", None)):
            for code, body in ((429, {"error": {"message": message}}), (503, message),
                               (200, {"error": {"code": 429, "message": message}})):
                with self.subTest(message=message, code=code):
                    self.assertEqual(self.asked(code, body), seconds or None)

    def test_asks_in_its_fields(self):
        """Google's retryDelay, retry_after however it is spelt, OpenRouter's reset."""
        def google(delay):
            return {"error": {"code": 429, "status": "RESOURCE_EXHAUSTED", "details": [
                {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": delay}]}}
        for body, seconds in (
                (google("37s"), 37), (google("0.512098s"), 0.512098), (google("0s"), None),
                ([google("37s")], 37), ({"error": {"retry_after": 10}}, 10),
                ({"retry_after": 10.5}, 10.5), ({"retry_after": "10"}, 10),
                ({"retry_after": "10s"}, 10), ({"retry_after_seconds": 10}, 10),
                ({"retry_after_ms": 350}, 0.35), ({"error": {"retryAfterMs": 350}}, 0.35),
                ({"retryAfter": 5}, 5), ({"retry-after": 5}, 5), ({"retry_after": -5}, None),
                ({"retry_after": None}, None), ({"retry_after": 1e30}, None),
                ({"retry_after": self.START + 60}, 60),
                ({"error": {"message": json.dumps({"retry_after": 3})}}, 3),
                ({"error": {"metadata": {"headers": {
                    "X-RateLimit-Reset": "%d" % (self.START * 1000 + 45000)}}}}, 45)):
            with self.subTest(body=body):
                self.assertEqual(self.asked(429, body), seconds)
        for code, body, headers, seconds in (  # and only a refusal asks
                (400, "try again in 5s", {}, None), (401, "", {"Retry-After": "9"}, None),
                (400, "", {"Retry-After": "9", "x-should-retry": "true"}, 9),
                (429, {"error": {"code": "insufficient_quota"}}, {"Retry-After": "9"}, 9),
                (200, "wait 30 seconds", {}, None)):
            with self.subTest(code=code, body=body):
                self.assertEqual(self.asked(code, body, headers), seconds)


class AStream(Case):
    """Takes the place of an answer that a gateway is too impatient for."""

    def play(self, *script, prompts=1, **options):
        """The completions of some prompts, and which requests asked for a stream, how."""
        with Server(*script) as server, self.client(server, **options) as client:
            done = [client.complete("Hi") for _ in range(prompts)]
        return done, [(request.body.get("stream"), request.body.get("stream_options"))
                      for request in server.requests]

    def test_brings_the_same_completion(self):
        """After 504, 524 or 408, with its usage; further calls stream from the start."""
        streamed = events(HEL, LO, STOP, dict(chunk(usage={
            "prompt_tokens": 2, "completion_tokens": 3}), choices=[]))
        plain = self.play(reply("Hello", id="c", object="chat.completion", created=7,
                                model="m-1"))[0][0]
        usage = (True, {"include_usage": True})
        for code in (504, 524, 408):
            with self.subTest(code=code):
                done, asked = self.play(status(code), *[status(200, streamed)] * 2, prompts=2)
                self.assertEqual(asked, [(None, None), usage, usage])
                self.assertEqual([one.attempts for one in done], [2, 1])
                for one in done:
                    for choice in one.body["choices"]:
                        self.assertEqual(choice.pop("index"), 0)
                    plain.body["choices"][0]["message"].pop("role", None)
                    self.assertEqual(one[:4] + one[7:], plain[:4] + plain[7:])

    def test_is_forced_or_forbidden(self):
        """stream=True asks for one at once, False never; and 503 is no reason for one."""
        usage, none = (True, {"include_usage": True}), (None, None)
        for option, code, asked in ((True, 504, [usage, usage]), (False, 504, [none, none]),
                                    (None, 503, [none, none]), (True, 503, [usage, usage])):
            with self.subTest(option=option, code=code):
                done = self.play(status(code), reply("yes"), stream=option)
                self.assertEqual((done[0][0].text, done[1]), ("yes", asked))

    def test_is_asked_for_as_the_server_can(self):
        """Without stream_options where a 400 names them; not at all where it knows no streams."""
        usage, bare, none = (True, {"include_usage": True}), (True, None), (None, None)
        no = failure("unknown_field", 400, message="unknown field stream_options")
        done, asked = self.play(no, *[status(200, events(HEL, LO, STOP))] * 2, prompts=2,
                                stream=True)
        self.assertEqual((asked, done[0].attempts), ([usage, bare, bare], 2))
        done, asked = self.play(
            status(504), failure("x", 400, message="stream is not supported"), reply("yes"),
            status(504), reply("yes"), prompts=2)
        self.assertEqual(asked, [none, usage, none, none, none])

    def test_of_a_time_out_is_the_last_try(self):
        """A time-out of our own is tried once more, as a stream, and says what to raise."""
        for option, second in ((None, True), (False, None)):
            with Server(stall(), stall()) as server:
                with self.assertRaisesRegex(cometlimit.APITimeoutError, "raise timeout=") as caught:
                    self.client(server, timeout=0.1, stream=option).ask("Hi")
            self.assertEqual(caught.exception.attempts, 2)
            self.assertEqual([request.body.get("stream") for request in server.requests],
                             [None, second])

    def test_that_breaks_off_is_tried_again(self):
        """Cut before its finish_reason, or ended by an error within."""
        part, half = events(HEL, end="").encode(), events(HEL, LO)
        for line in (cut_short(200, part), status(200, half), raw(HEAD + b"\r\n" + part),
                     raw(HEAD + CHUNKED + b"%x\r\n%s\r\n" % (len(part), part)),
                     status(200, events(HEL, {"error": {"code": 503, "message": "busy"}}))):
            with self.subTest():
                done, _ = self.play(line, status(200, events(HEL, LO, STOP)), stream=True)
                self.assertEqual((done[0].text, done[0].attempts), ("Hello", 2))


class ALimit(Case):
    """Who may be sent, and when."""

    def test_holds_its_model_back_and_no_other(self):
        """While the throttle holds a model back, or all its calls are in backoff, others go on."""
        self.real_time()

        def line(request):
            held = request.body["model"] == "a"
            return status(503, headers={"Retry-After": "25"}) if held else reply_echo(request)

        def hold(own, ticket, now, status, retry_after):
            own.wait = lambda now: retry_after
            told.append((status, retry_after))
        for methods in ({"refused": hold}, {"wait": lambda *_: 0.0}):
            told = []
            self.throttle(**methods)
            with self.subTest(methods), Server(forever=line) as server:
                client = self.client(server, max_concurrency=2)
                held = [client.submit("Hi", model="a") for _ in range(40)]
                self.until(lambda: told or "refused" not in methods)
                for text in "012345":
                    done = client.submit(text, model="b").result(TIMEOUT)
                    self.assertEqual(done.text, text)
                client.close()
                self.assertTrue(all(call.exception(TIMEOUT) for call in held))
            if told:  # one may have been in flight
                self.assertIn(told, ([(503, 25.0)], [(503, 25.0)] * 2))

    def test_serves_first_who_came_first(self):
        """In the order of submit; who comes again goes before those still to come."""
        self.real_time()
        with Server(forever=reply_echo) as server:
            for _ in range(15):
                with self.client(server) as client:
                    for prompt in "abcd":
                        client.submit(prompt)
        self.assertEqual("".join(request.prompt for request in server.requests), "abcd" * 15)

        def line(request):
            if request.prompt == "b":
                time.sleep(0.15)  # in which the backoff of a, 0.02 s at most, ends
            return status(503) if len(server.requests) == 1 else reply_echo(request)
        with Server(forever=line) as server:
            with self.client(server, max_delay=0.02) as client:
                for prompt in "abcd":
                    client.submit(prompt)
        self.assertEqual("".join(request.prompt for request in server.requests), "abacd")

        waiting = threading.Event()
        with Server(lambda request: waiting.wait(TIMEOUT) and reply("a"),
                    forever=reply_echo) as server:
            with self.client(server) as client:
                for prompt, model in (("a", "x"), ("b", "y"), ("c", "x")):
                    client.submit(prompt, model=model)
                    time.sleep(0.2)  # for its thread to wait
                waiting.set()
        self.assertEqual("".join(request.prompt for request in server.requests), "abc")

    def test_is_not_learnt_from_a_prompt_that_is_refused_each_time(self):
        """Refused again, though many others were answered, it says nothing about load; where few
        were, it does."""
        self.real_time()
        for count, times in ((80, 1), (3, 3)):
            told, submitted = [], threading.Event()
            self.throttle(wait=lambda *_: 0.0,
                          refused=lambda own, *rest, told=told: told.append(rest[2:]))

            def line(request, submitted=submitted):
                submitted.wait(TIMEOUT)
                time.sleep(0.01)
                return status(503) if request.prompt == "bad" else reply_echo(request)
            with Server(forever=line) as server:
                with self.client(server, max_delay=0.25, max_retries=2) as client:
                    bad = client.submit("bad")
                    for _ in range(count):
                        client.submit("good")
                    submitted.set()
                    self.assertEqual(bad.exception(TIMEOUT).attempts, 3)
            self.assertEqual(told, [(503, None)] * times)

    def test_wakes_whom_an_answer_lets_go(self):
        """A server with one slot that rests half a second takes no longer than its rests."""
        class Slot(cometlimit.Throttle):
            flying, free_at = 0, 0.0

            def wait(self, now):
                return math.inf if self.flying else max(0.0, self.free_at - now)

            def sent(self, now):
                self.flying += 1
                return super().sent(now)

            def answered(self, ticket, now):
                self.flying, self.free_at = 0, now + 0.5
                super().answered(ticket, now)
        self.throttle(Slot)
        with Server(forever=reply_echo) as server:
            client = self.client(server, max_concurrency=4)
            calls = [client.submit(str(number)) for number in range(7)]
            self.assertEqual([call.result(TIMEOUT).text for call in calls], list("0123456"))
        self.assertEqual(self.now, 1003.0)

    def test_may_be_given_as_max_rate(self):
        """Never exceeded, all models and retries together; a rest saves nothing up."""
        self.throttle(wait=lambda *_: 0.0)
        with Server(reply("yes"), status(503), forever=reply_echo) as server:
            with self.client(server, max_rate=0.5) as client:
                for model in "abac":
                    client.ask("Hi", model=model)
                self.now += 100.0
                for model in "ab":
                    client.ask("Hi", model=model)
        self.assertEqual([request.time - 1000.0 for request in server.requests],
                         [0.0, 2.0, 4.0, 6.0, 8.0, 108.0, 110.0])
        self.real_time()

        def late(request):
            server.await_requests(12)  # no answer wakes those that wait
            return reply_echo(request)
        with Server(forever=late) as server:
            with self.client(server, max_rate=50, max_concurrency=12) as client:
                start = time.monotonic()
                for number in range(12):
                    client.submit("Hi", model="abc"[number % 3])
            self.assertGreaterEqual(time.monotonic() - start, 11 / 50)

    def test_is_told_to_the_logger(self):
        """What is tried again, and when the limit was met, is logged as information."""
        with self.assertLogs("cometlimit", "INFO") as logs:
            self.outcome(*[failure("busy", 429)] * 3, reply("yes"))
        text = "\n".join(logs.output)
        self.assertRegex(text, "model m: limit met")
        self.assertIn("model m: attempt 1 of 5: HTTP 429 busy: why; next in 1.0 s", text)


class ARecord(Case):
    """Every HTTP attempt leaves one."""

    def test_tells_everything_of_its_attempt(self):
        """It goes to on_record, to the logger and to the error, field by field."""
        self.throttle(wait=lambda *_: 0.0)
        records, tag = [], {"row": 7}
        with self.assertLogs("cometlimit", "DEBUG") as logs, Server(*map(self.slow, (
                failure("busy", 429, message="x (request id: r7)"), raw(b"HTTP"), status(503),
                reply("yes", {"x-request-id": "r8"})))) as server:
            with self.client(server, on_record=records.append) as client:
                client.submit("Hi", tag=tag).result(TIMEOUT)
        self.assertNotIn("tag", server.requests[0].body)
        rest = (self.START, "/v1/chat/completions", "m")
        self.assertEqual([tuple(record) for record in records], [
            rest + (429, 0.5, 1, 0.0, "r7", "busy", 0, 0, tag),
            rest + (None, 0.5, 2, 1.0, None, "connection_error", 0, 0, tag),
            rest + (503, 0.5, 3, 2.0, None, "http_503", 0, 0, tag),
            rest + (200, 0.5, 4, 4.0, "r8", None, 2, 3, tag)])
        self.assertEqual([log.getMessage() for log in logs.records if log.levelname == "DEBUG"],
                         [repr(record) for record in records])

    def test_breaks_nothing_where_it_is_used_badly(self):
        """Whatever on_record or a handler of the log raises, the answer comes, and it is logged."""
        class Bad(logging.Handler):
            def emit(self, record):
                raise OSError("disk full")
        for bad in (sys.exit, lambda record: 1 / 0, lambda: None):
            with self.subTest(), self.assertLogs("cometlimit", "ERROR") as logs:
                self.assertEqual(self.outcome(status(503), reply("yes"), on_record=bad).text, "yes")
            self.assertEqual([log.getMessage() for log in logs.records], ["on_record failed"] * 2)
        handler, logger = Bad(), logging.getLogger("cometlimit")
        self.addCleanup(logger.removeHandler, handler)
        self.addCleanup(logger.setLevel, logger.level)
        logger.addHandler(handler)
        logger.setLevel("DEBUG")
        self.assertEqual(self.outcome(status(503), reply("yes")).text, "yes")


class TheMetrics(Case):
    """Client.metrics, by route and model."""

    KEY = ("/v1/chat/completions", "m")

    def test_add_up(self):
        """Requests, answers, statuses, retries, tokens and latencies."""
        with Server(status(503), *[self.slow(reply("yes"), number)
                                   for number in range(1, 21)]) as server:
            with self.client(server) as client:
                empty = client.metrics
                list(client.map(["Hi"] * 19))
                before = client.metrics
                client.ask("Hi", model="n")
                metrics = client.metrics
        other = (self.KEY[0], "n")
        self.assertEqual([list(one) for one in (empty, before, metrics)],
                         [[], [self.KEY], [self.KEY, other]])
        for total, times in ((metrics, 1), (metrics + empty, 1), (metrics + metrics, 2)):
            stats = total[self.KEY]
            self.assertEqual((stats.requests, stats.answers, stats.retries, stats.prompt_tokens,
                              stats.completion_tokens), tuple(times * number for number in
                                                              (20, 19, 1, 38, 57)))
            self.assertEqual(dict(stats.statuses), {200: 19 * times, 503: times})
            self.assertEqual(total[other].requests, times)
            for share, value in ((0.5, 10), (0.95, 19), (1.0, 19)):
                self.assertLess(abs(stats.latency(share) / value - 1), 0.03)

    def test_tell_what_limits_now_and_what_was_worth_little(self):
        """What the throttle holds to; answers without text, or cut off; all in 80 columns."""
        def learn(own, ticket, now):
            own.rate, own.window, own.chance = 2.5, 3, 7
            THROTTLE.answered(own, ticket, now)

        def answer(text, reason):
            return reply("", choices=[{"message": {"content": text}, "finish_reason": reason}])

        def values(stats):
            return stats.rate, stats.window, stats.chance, stats.empty, stats.cut_off
        self.throttle(answered=learn)
        models = ["m", "n" * 24, "o" * 25, "p" * 60]
        with Server(HANG_UP, answer("", "stop"), answer("x", "length"), answer("", "length"),
                    answer(None, "tool_calls"), forever=lambda _: reply("yes")) as server:
            with self.client(server) as client:
                for model in models[:1] * 4 + models[1:]:
                    client.ask("Hi", model=model)
                metrics = client.metrics
        self.assertEqual(values(metrics[self.KEY]), (2.5, 3, 7, 2, 2))
        stats = (metrics + metrics)[self.KEY]
        self.assertEqual((values(stats), dict(stats.statuses)),
                         ((None, None, 14, 4, 4), {None: 2, 200: 8}))
        metrics[self.KEY].statuses.update({code: 10 ** 7 for code in RETRIED})
        table = str(metrics)
        self.assertLessEqual(max(map(len, table.split("\n"))), 80)
        self.assertRegex(table, r"\Amodel +requests +answers +retries +p50 s +p95 s +max s\n"
                                r"m +5 +4 +1 +\d")
        for words in models + ["none x 1", "7 of these by chance"]:
            self.assertIn(words, table.replace("\n  ", " "))


class ADeadline(Case):
    """timeout is for an attempt, deadline for a prompt."""

    def test_is_not_overrun_by_waits(self):
        """A prompt fails, at once and with its last error, rather than be tried again too late."""
        error = self.outcome(status(503), status(503), deadline=2.9)
        self.assertEqual((error.status_code, error.attempts, error.records[1].waited, self.now),
                         (503, 2, 1.0, 1001.0))
        error = self.outcome(status(429, headers={"Retry-After": "20"}), deadline=20)
        self.assertEqual((error.retry_after, error.attempts, self.now), (20.0, 1, 1001.0))

    def test_passes_in_the_line_too(self):
        """What has not been sent by then fails at that moment."""
        self.throttle(wait=lambda *_: 20.0)
        self.assert_error(self.outcome(deadline=5.0), cometlimit.APITimeoutError,
                          "not sent before its deadline", code="timeout", attempts=0, records=())
        self.assertEqual(self.now, 1005.0)

    def test_ends_an_attempt(self):
        """An attempt takes no longer than what is left of it."""
        error = self.outcome(stall(), deadline=0.1)
        self.assertIs(type(error), cometlimit.APITimeoutError)
        self.assertEqual((error.code, [record.error for record in error.records]),
                         ("timeout", ["timeout"]))
        self.assertRegex(str(error), r"^no answer from 127\.0\.0\.1:\d+ within 0\.1 s: raise")


class BadInput(Case):
    """Is a ConfigurationError that says what was met, before anything is sent."""

    def refused(self, words, job, **options):
        with self.assertRaises(cometlimit.ConfigurationError) as caught:
            job(**options)
        error = caught.exception
        self.assertIn(words, str(error))
        self.assertEqual((error.attempts, error.retryable, error.code),
                         (0, False, "invalid_request"))
        self.assertNotIn(KEY, "".join(traceback.format_exception(
            type(error), error, error.__traceback__)) + repr(vars(error)))

    def test_of_the_constructor(self):
        """Numbers, callbacks, headers and files are checked."""
        def whole(least):
            return "%%s is a whole number from %d, not %%r" % least
        seconds, rate = ("%%s is a number of %s above 0, not %%r" % unit
                         for unit in ("seconds", "requests a second"))
        never = (0, -1, "30", True, NAN, float("inf"), float("-inf"),
                 1e300)  # which no clock of a thread can wait for
        for name, words, values in (
                ("max_concurrency", whole(1), (0, -1, 2.5, True, "5", None)),
                ("max_retries", whole(0), (-1, 1.0, False, "4", None)),
                ("timeout", seconds, never + (None,)), ("max_delay", seconds, never + (None,)),
                ("deadline", seconds, never), ("max_rate", rate, never),
                ("on_record", "%s is a function, not %r", (5,)), ("check", "%s is", ("x",)),
                ("stream", "%s is", ("yes",)), ("ca_file", "'/no/file'", ("/no/file",))):
            for value in values:
                with self.subTest(name=name, value=value):
                    expected = words % ((name, value)[:words.count("%")])
                    self.refused(expected, cometlimit.Client, api_key=KEY, **{name: value})
        for name, value in (("X Team", "a"), ("", "a"), ("X:", "a"), ("X\n", "a"), (b"X", "a"),
                            ("X", ""), ("X", "a\r\nY: b"), ("X", "caf\xe9"), ("X", 5),
                            ("X", None), ("Host", "a"), ("connection", "a"),
                            ("Content-Length", "1"), ("TRANSFER-ENCODING", "a")):
            with self.subTest(name=name, value=value):
                self.refused("header", cometlimit.Client, api_key=KEY, headers={name: value})

    def test_of_the_key(self):
        """A missing key, or one with a character that no key has, is never shown."""
        for key in (None, "", " \r\n\ufeff", b"sk", 5):
            with self.subTest(key=key):
                self.refused("there is no API key", cometlimit.Client, api_key=key)
        for sign in " \n\r\t\0\x7f\xa0\xe9\u2019\u200b\ufeff":
            with self.subTest(sign=sign):
                self.refused("the API key has a character that no key has",
                             cometlimit.Client, api_key=KEY + sign + KEY)

    def test_of_the_address(self):
        """Whatever is no https address, or http of this machine, is refused; no key is shown."""
        scheme, host, plain = "https:// is missing", "no host or no port", "allow_http=True"
        user, sign = "a user name", "a character that no URL has"
        for url, words in (
                ("", scheme), ("example.com/v1", scheme), ("ftp://example.com", scheme),
                (123, ""), (b"https://x", ""), ("https://x\n/y", ""), ("file:///etc/hosts", scheme),
                (KEY, scheme), ("https:///v1", host),
                ("https://h:0/v1", host), ("https://h/v1#top", "a fragment"),
                ("https://h/v1#" + KEY, "a fragment"), ("http://example.com/v1", plain),
                ("http://127.0.0.1.example.com", plain), ("http://localhost.example.com", plain),
                ("http://0.0.0.0.example.com", plain), ("http://10.0.0.1", plain),
                ("http://%s/v1" % KEY, ""), ("https://h:65536/v1", ""), ("https://h:x/v1", ""),
                ("https://[::1/v1", ""), ("https://%s.com" % ("a" * 64), ""),
                ("https://h:" + KEY, ""), ("https://h/v 1", sign), ("https://h/v\xe9", sign),
                ("https://user@h/v1", user), ("https://me:word@h/v1", "//***@h/v1"),
                ("https://%s@h" % KEY.replace("/", ""), user), ("https://u:%s@h" % KEY, "")):
            with self.subTest(url=url):
                self.refused(words, cometlimit.Client, api_key=KEY, base_url=url)
        for url, base in (("http://localhost:1/v1/", None), ("http://[::1]:1", None),
                          ("http://127.1.2.3/", None), ("http://0.0.0.0:8000", None),
                          ("https://h:65535", None), ("HTTPS://H/v1/", "https://H/v1"),
                          ("https://h/v1/chat/completions/", "https://h/v1"),
                          ("https://h/v1?key=" + KEY, "https://h/v1?key=***")):
            with self.subTest(url=url):
                client = cometlimit.Client(api_key=KEY, base_url=url)
                self.assertEqual(client.base_url, base or url.rstrip("/"))
                self.assertIn(client.base_url, repr(client))

    def test_of_the_request(self):
        """A prompt is text, messages or a dict with them; parameters are JSON, and no options."""
        loop, hi = [], [{"role": "user", "content": "Hi"}]
        loop.append(loop)
        prompt, model = "a prompt is a string", "no model is named"
        table = [(bad, {}, prompt) for bad in (
            5, None, b"Hi", {"role": "user"}, [], ["Hi"], hi + ["Hi"], {"messages": "Hi"})]
        table += [("Hi", {"model": bad}, model) for bad in ("", None, 5)]
        table += [({"messages": hi, "model": ""}, {}, model)]
        table += [("Hi", {"temperature": bad}, "JSON") for bad in (
            NAN, float("inf"), {1, 2}, b"x", object(), loop, {(1, 2): 3})]
        for name in set(parameters(cometlimit.Client)) - {"model"} | {"stream_options"}:
            words = "stream" if name.startswith("stream") else name  # it would do nothing there
            table += [("Hi", {name: KEY}, words), ({"messages": hi, name: KEY}, {}, words)]
        with Server() as server, self.client(server) as client:
            for bad, params, words in table:
                with self.subTest(bad=bad, **params):
                    self.refused(words, lambda: client.submit(bad, **params))
            for prompts in ("Hi", b"Hi", {"messages": hi}):
                self.refused("there is ask()", lambda: list(client.map(prompts)))
            with self.assertRaises((cometlimit.ConfigurationError, TypeError)):
                list(client.map(5))
        self.assertEqual(server.requests, [])


class TheKey(Case):
    """Is shown nowhere."""

    def test_is_not_shown_though_the_server_echoes_it(self):
        """Not by repr, log, Record, Error, pickle or traceback, however it is escaped."""
        escaped = (KEY, json.dumps(KEY)[1:-1], KEY.replace("/", "\\/"), KEY.replace(
            "<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"),
            "".join("\\u%04x" % ord(sign) for sign in KEY))
        lines = [status(code, '{"error": {"%s": "the key %s is bad"}}' % (field, form))
                 for form in escaped for field in ("message", "code", "type", "param")
                 for code in (401, 200)]
        lines += [status(401, '{"%s": "%s"}' % ("detail", form)) for form in escaped]
        lines += [status(401, "<p>%s</p>" % KEY), status(401, "x" * 190 + KEY),
                  raw(KEY.encode() + b"\r\n\r\n"), raw(b"HTTP/1.1 " + KEY.encode() + b"\r\n\r\n"),
                  status(401, headers={"x-request-id": KEY}),
                  status(401, {"error": {"message": "(request id: %s)" % KEY}})]
        for line in lines:
            records = []
            with self.subTest(), self.assertLogs("cometlimit", "DEBUG") as logs:
                with Server(line) as server:
                    with self.client(server, max_retries=0, on_record=records.append) as client:
                        try:
                            client.ask("Hi")
                        except cometlimit.Error as error:
                            shown = [traceback.format_exc(), repr(error), repr(vars(error)),
                                     repr(client), repr(records), repr(client.metrics),
                                     repr(pickle.dumps(error)), repr(logs.output)]
                self.assertEqual([text for text in shown if KEY in text], [])

    def test_is_not_shown_as_json_writes_it(self):
        """In a body that is JSON, twice over, cut off, or none; what stands before it stays."""
        twice = KEY[:2] + "".join("\\\\u%04x" % ord(sign) for sign in KEY[2:])
        for form in (KEY, json.dumps(KEY)[1:-1], KEY.replace("/", "\\/"), twice,
                     "".join("\\u%04X" % ord(sign) for sign in KEY)):
            for text in ("<p>%s</p>", "[1, %s", '{"a": "b %s"}'):
                with self.subTest(form=form, text=text):
                    body = self.outcome(status(401, text % form)).body
                    shown = json.dumps(body) if isinstance(body, dict) else body
                    self.assertEqual(shown, text % "***")
        body = self.outcome(status(401, "x" * (cometlimit._MAX_ERROR - 6) + KEY)).body
        self.assertNotIn(KEY[:3], body)
        self.assertEqual(cometlimit._hider("none")("there is none"), "there is none")

    def test_is_not_shown_by_debugging_aids(self):
        """Locals in a traceback, http.client's debug level, urllib's opener, audit hooks."""
        seen = []
        spy = types.SimpleNamespace(open=lambda *request: seen.append(request))
        self.replace(urllib.request, _opener=spy)  # as install_opener() does
        self.replace(cometlimit.http.client.HTTPConnection, debuglevel=1)
        with Server(status(401)) as server, contextlib.redirect_stdout(io.StringIO()) as printed:
            error = self.client(server).submit("Hi").exception(TIMEOUT)
        shown = "".join(traceback.TracebackException(
            type(error), error, error.__traceback__, capture_locals=True).format())
        self.assertNotIn(KEY, shown)
        self.assertEqual((seen, printed.getvalue()), ([], ""))
        if hasattr(sys, "addaudithook"):
            with Server(forever=reply_echo) as server:
                self.assertEqual(end(start(server, "seen = []; sys.addaudithook("
                                           "lambda *event: seen.append(repr(event)))", ASK + """
                assert "urllib.Request" in str(seen) and %r not in str(seen)""" % KEY)), (0, ""))


class TheEnd(Case):
    """Whatever waits can be woken, and nothing runs on."""

    def test_is_quick(self):
        """By an exception in the block all ends at once; by stop() what is in flight comes back."""
        def wait(condition, seconds):  # who waits is slow to go, and must not be sent meanwhile
            condition.wait(min(seconds, TIMEOUT))
            condition.release()
            time.sleep(0.1)
            condition.acquire()
        self.real_time()
        cometlimit._wait = wait
        for way in ("closed", "stopped"):
            seen, gate = threading.Event(), threading.Event()

            def line(request):
                if request.prompt != "rests":
                    gate.wait(TIMEOUT)
                return reply_echo(request) if request.prompt == "flies" else status(503)
            with self.subTest(way=way), Server(forever=line) as server:
                with contextlib.suppress(ZeroDivisionError), self.client(
                        server, max_concurrency=2, deadline=1e6,
                        on_record=lambda _: seen.set()) as client:
                    calls = [client.submit("rests", model="n")]  # in backoff
                    self.assertTrue(seen.wait(TIMEOUT))
                    calls += [client.submit("flies"), client.submit("fails")]
                    server.await_requests(3)
                    calls.append(client.submit("waits"))
                    start = time.monotonic()
                    if way == "closed":
                        1 / 0
                    client.stop()
                    for call in (calls[0], calls[3]):
                        call.exception(TIMEOUT)
                    self.assertLess(time.monotonic() - start, 2.0)
                    self.assertFalse(calls[1].done() or calls[2].done())
                    with self.assertRaisesRegex(cometlimit.ConfigurationError,
                                                "^the client was stopped: make a new one$"):
                        client.submit("late")
                    gate.set()
                gone = [call.exception(TIMEOUT) for call in calls]
                if way == "closed":
                    self.assertLess(time.monotonic() - start, 2.0)
                    self.threads_end()
                    with self.assertRaisesRegex(cometlimit.ConfigurationError,
                                                "^the client was closed: make a new one$"):
                        client.ask("Hi")
                else:
                    self.assertEqual((calls[1].result().text, gone[2].status_code), ("flies", 503))
                    del gone[1:3], calls[1:3]
                for call, error in zip(calls, gone):
                    self.assert_error(error, cometlimit.Error, "given up: the client was " + way,
                                      code="cancelled")
                    attempts = 0 if call is calls[-1] else 1
                    self.assertEqual((error.attempts, len(error.records)), (attempts,) * 2)
                gate.set()
            self.assertEqual(len(server.requests), 3)

    def test_comes_to_idle_threads(self):
        """A client that is forgotten leaves no thread behind."""
        with Server(forever=reply_echo) as server:
            client = cometlimit.Client(api_key=KEY, base_url=server.url, model="m")
            list(client.map(list("0123456")))
            del client
            gc.collect()
            self.threads_end()

    def test_by_ctrl_c_is_quick(self):
        """In less than a second, whatever it waits for, whichever thread gets the signal."""
        held = status(503, headers={"Retry-After": "30"})
        block = "with client: [client.submit('Hi') for _ in range(9)]"
        before, runs = """
                import signal  # a line of input is a signal that another thread gets
                signal.signal(signal.SIGINT, signal.default_int_handler)
                threading.Thread(target=lambda: sys.stdin.readline() and signal.pthread_kill(
                    threading.get_ident(), signal.SIGINT), daemon=True).start()""", []
        with contextlib.ExitStack() as stack:
            for line, job, direct in (
                    (stall(), "client.ask('Hi')", False), (held, "client.ask('Hi')", True),
                    (stall(), "list(client.map(map(str, range(100))))", False),
                    (stall(), block, False), (held, block, True)):
                server = stack.enter_context(Server(forever=line))
                runs.append((server, start(server, before, job, stdin=subprocess.PIPE), direct))
                stack.callback(runs[-1][1].kill)
            for server, _, _ in runs:
                server.await_requests(1)
            time.sleep(0.1)
            for _, process, direct in runs:
                with self.subTest(process.args), self.within(2.0):  # on a busy machine
                    if direct:
                        process.send_signal(signal.SIGINT)
                    text = end(process, b"" if direct else b"\n")[1]
                    self.assertIn("KeyboardInterrupt", text)
                    self.assertNotIn("Exception in thread", text)

    def test_of_a_callback_is_not_that_of_a_thread(self):
        """A callback that raises, sys.exit() included, costs no other answer and no thread."""
        gate = threading.Event()
        with Server(forever=lambda request: gate.wait(TIMEOUT) and reply("yes")) as server:
            for fault, logger in ((ValueError, "concurrent.futures"), (SystemExit, "cometlimit")):
                def bad(call):
                    raise fault("callback")
                with self.subTest(fault=fault), self.assertLogs(logger, "ERROR") as logs:
                    gate.clear()
                    with self.client(server) as client:
                        for number in range(5):
                            client.submit(str(number)).add_done_callback(bad)
                        last = client.submit("last")
                        gate.set()
                self.assertEqual((len(logs.records), last.result().text), (5, "yes"))


def line(value):
    """A line of a file: bytes as they are, anything else as JSON."""
    return value if isinstance(value, bytes) else json.dumps(value).encode() + b"\n"


def rows(count, start=0):
    """Input rows r0, r1 ... which ask p0, p1 ..."""
    return [{"custom_id": "r%d" % n, "prompt": "p%d" % n} for n in range(start, start + count)]


def result(name, text="old", **fields):
    """An output row of another program: an answer, unless the fields say otherwise."""
    return dict({"id": "batch_req_1", "custom_id": name, "error": None, "response": {
        "status_code": 200, "request_id": "q", "body": {
            "choices": [{"message": {"content": text}}]}}}, **fields)


class CommandLine(Case):
    """A folder of its own, a key and a server's address in the environment, and the real clock."""

    def setUp(self):
        super().setUp()
        self.real_time()
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(folder.name)
        os.environ["COMETAPI_KEY"] = KEY
        ignored = signal.signal(signal.SIGINT, signal.default_int_handler)  # as after `command &`
        self.addCleanup(signal.signal, signal.SIGINT, ignored)

    @contextlib.contextmanager
    def serve(self, *script, **options):
        with Server(*script, **options) as server:
            os.environ["COMETAPI_BASE_URL"] = server.url
            yield server

    def tiring(self, line, after=5):
        """For Server's `forever`: late after so many requests, so that a run has time to stop."""
        count = itertools.count()
        return lambda request: time.sleep(0.0 if next(count) < after else 0.3) or line

    def write(self, name, values):
        with open(name, "wb") as file:
            file.write(b"".join(map(line, values)))

    def read(self, name):
        with open(name, "rb") as file:
            return file.read()

    def results(self, name="out"):
        return [json.loads(row) for row in self.read(name).decode().splitlines()]

    def answers(self, name="out"):
        """(custom_id, text or error code) of each row."""
        return [(row["custom_id"], row["response"]["body"]["choices"][0]["message"]["content"]
                 if row["error"] is None else row["error"]["code"]) for row in self.results(name)]

    def cli(self, *argv, stdin=b"", pipe=b"", expect=0):
        """Run main() in this process; leaves self.out (bytes) and self.err (a text)."""
        kept = sys.stdin, sys.stdout, sys.stderr
        with tempfile.TemporaryFile() as file:
            file.write(stdin)
            file.seek(0)
            sys.stdin = io.TextIOWrapper(file, "ascii")
            if pipe:
                source, sink = os.pipe()
                os.write(sink, pipe)
                os.dup2(source, file.fileno())
                os.close(source), os.close(sink)
            sys.stdout, sys.stderr = [io.TextIOWrapper(io.BytesIO(), "ascii") for _ in "oe"]
            try:
                code = cometlimit.main(["-m", "m", "--max-retries", "0"] + list(argv))
                texts = []
                for stream in (sys.stdout, sys.stderr):
                    stream.flush()
                    texts.append(stream.buffer.getvalue())
            finally:
                sys.stdin, sys.stdout, sys.stderr = kept
        self.out, self.err = texts[0], texts[1].decode()
        self.assertEqual(code, expect, self.err)
        self.assertNotIn("Traceback", self.err)
        return self.out

    def start(self, *argv, wrap=(), **options):
        """A process of the program, killed with the test if it is still there."""
        options = dict(dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE), **options)
        process = subprocess.Popen(
            list(wrap) + PROGRAM + ["-m", "m", "--max-retries", "0"] + list(argv), **options)

        def end():
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe:
                    pipe.close()
        self.addCleanup(end)
        return process

    def finish(self, process, expect, timeout=TIMEOUT, stdin=None):
        self.out, err = process.communicate(stdin, timeout)
        self.err = (err or b"").decode()
        self.assertEqual(process.returncode, expect, self.err)
        self.assertNotRegex(self.err, "Traceback|Fatal Python error")
        return self.out


class Prompts(CommandLine):

    def test_are_answered_by_a_json_array_in_their_order(self):
        """The answers stand on stdout in the prompts' order, and nothing else does."""
        def late(request):
            if request.prompt == "a":
                server.await_requests(3)
            return reply_echo(request)
        with self.serve(forever=late) as server:
            self.assertEqual(json.loads(self.cli("a", "b", "c").decode()), ["a", "b", "c"])

    def test_one_that_fails_is_null(self):
        """A failed prompt is null in its place; its error is on stderr, and the status is 1."""
        bad = status(400, {"error": {"message": "not this"}})
        with self.serve(forever=lambda request: bad if request.prompt == "b" else (
                reply_echo(request))):
            out = self.cli("a", "b", "c", expect=1)
            self.assertEqual(json.loads(out.decode()), ["a", None, "c"])
            self.assertEqual(self.err.count("not this"), 1)
            self.assertEqual(self.cli("b", expect=1), b"[null]\n")
            self.assertEqual(self.err, "cometlimit: line-1: HTTP 400: not this\n")
            self.assertEqual(self.cli("--text", "-q", "a", "b", "c", expect=1), b"a\nc\n")

    def test_are_answered_by_bare_text(self):
        """--text: one answer after the other, each with a newline, in order; no table for one."""
        with self.serve(forever=reply_echo):
            self.assertEqual(self.cli("--text", "two\nlines", "é"), "two\nlines\né\n".encode())
            self.assertEqual(self.cli("--text", "a"), b"a\n")
            self.assertEqual(self.err, "")
            self.assertEqual(self.cli("--text", stdin=b"a\nb\n"), b"a\nb\n")
            self.write("in", rows(2))
            self.assertEqual(self.cli("--text", "-i", "in"), b"p0\np1\n")

    def test_are_taken_as_they_stand(self):
        """What looks like JSON or has line ends is still one prompt; answers are readable, letters
        of all scripts stand as themselves, half surrogates as escapes."""
        prompts = ['{"prompt": "x"}', '"quoted"', "[1]", "two\nlines", " spaces ",
                   "é\u2028 漢 \U0001f600"]
        with self.serve(forever=reply_echo):
            out = self.cli(*prompts).decode()
        self.assertEqual(json.loads(out), prompts)
        self.assertIn("漢 \U0001f600", out)
        with self.serve(reply("half \ud83d")):
            self.assertEqual(self.cli("a"), b'["half \\ud83d"]\n')

    def test_come_one_a_line_from_stdin(self):
        """With - or a pipe, each line of stdin is a prompt; a BOM and blank lines are none."""
        for stdin, expected in (
                (b"", []), (b"a", ["a"]), (b"a\r\n\n  \nb\n", ["a", "b"]),
                (BOM + b"a\n" + BOM + b"b\n", ["a", "b"]),
                (b"[draft] b\n12\n[1]\n", ["[draft] b", "12", "[1]"]),
                ("a\u2028b\x85c\x0bd\n".encode(), ["a\u2028b\x85c\x0bd"]),
                ("«oui»\n«non»\n".encode(), ["«oui»", "«non»"]),
                ("！（x）\n！y\n".encode(), ["！（x）", "！y"]), (b"a\n\0\0\0", ["a"])):
            for argv in ((), ("-",)):
                with self.subTest(stdin=stdin, argv=argv), self.serve(forever=reply_echo):
                    self.assertEqual(json.loads(self.cli(*argv, stdin=stdin).decode()), expected)

    def test_have_their_places_even_after_a_stop(self):
        """However a run ends, the array has a place for every prompt, null without an answer."""
        tired = self.tiring(status(401, "bad key"), 14)
        with self.serve(forever=lambda request: reply("0") if request.prompt == "0" else (
                tired(request))):
            out = self.cli("-c", "1", *map(str, range(30)), expect=3)
        self.assertEqual(json.loads(out.decode()), ["0"] + [None] * 29)

        def late(request):
            if request.prompt == "0":
                return status(503)
            server.await_requests(3)
            time.sleep(0.4)
            return reply_echo(request)
        with self.serve(forever=late) as server:
            process = self.start("-c", "3", "--max-retries", "4", "0", "1", "2")
            server.await_requests(3)
            time.sleep(0.1)
            process.send_signal(signal.SIGTERM)
            out = self.finish(process, 143)
        self.assertEqual(json.loads(out.decode()), [None, "1", "2"])


class InputRows(CommandLine):

    def test_may_have_many_forms(self):
        """Batch requests, bare bodies, {"prompt": ...} and plain text are asked; null is absent."""
        chat = [{"role": "user", "content": "x"}]
        body = {"model": "own", "messages": chat}
        batch = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
        bare = dict(body, temperature=0)
        said = {"model": "m", "messages": chat}
        wide = {"model": "m", "messages": [{"role": "user", "content": "x\u2028\x85y"}]}
        for text, name, expected in (
                (batch, "a", body), (dict(batch, custom_id=7), "7", body), (bare, "line-1", bare),
                ({"custom_id": "a", "body": body, "note": 1}, "a", body),
                (dict(batch, url="https://host/v1/chat/completions"), "a", body),
                (dict(batch, url=None, method=None, body=dict(body, stop=None)), "a", body),
                ({"prompt": "x", "messages": None, "model": None, "n": None}, "line-1", said),
                ({"prompt": None, "messages": chat, "custom_id": None}, "line-1", said),
                ({"prompt": "x"}, "line-1", said), ({"prompt": chat}, "line-1", said),
                ({"prompt": "x", "id": 3}, "3", said), ({"messages": chat, "id": "b"}, "b", said),
                (dict(batch, id="c"), "a", body), ({"id": "a", "body": body}, "line-1", body),
                ({"prompt": "x", "n": 2}, "line-1", dict(said, n=2)),
                ({"prompt": "x", "self": 2, "tag": 1}, "line-1", dict(said, self=2, tag=1)),
                ({"custom_id": "é\ud800", "messages": chat}, "é\ud800", said),
                (b"x\n", "line-1", said), (b"x", "line-1", said), (b"  x\r\n", "line-1", said),
                (BOM + b"x\n", "line-1", said), (b'\n \nx\n', "line-3", said),
                (b'"x"\n', "line-1", dict(said, messages=[{"role": "user", "content": '"x"'}])),
                (BOM + line(batch), "a", body), (line(batch) + b"\0\0\0\0", "a", body),
                ('{"prompt": "x\u2028\x85y"}'.encode(), "line-1", wide)):
            with self.subTest(text=text), self.serve(reply("yes")) as server:
                self.write("in", [text])
                row = json.loads(self.cli("-q", "-i", "in").decode())
                self.assertEqual(server.requests[0].body, expected)
                self.assertEqual((row["custom_id"], row["error"]), (name, None))

    def test_that_are_bad_fail_alone(self):
        """A bad row becomes an error row with its line; it is not sent, and stops nothing."""
        batch = {"custom_id": "bad", "body": {"messages": [{"role": "user", "content": "x"}]}}
        bad = [(text, "invalid_json_line") for text in (
            b"{\n", b"{'prompt': 'x'}\n", b"\xff\xfe\n", b"{" * 5000 + b"\n", b"null\n",
            b"123\n", b'["x"]\n')]
        bad += [(value, "invalid_request") for value in (
            dict(batch, url="/v1/embeddings"), dict(batch, method="GET"), dict(batch, body="x"),
            {"custom_id": "x"}, {"prompt": "x", "stream": True}, {"prompt": 5}, {"prompt": []},
            {"prompt": "x", "messages": [{}]}, {"prompt": "x", "model": 5}, {"prompt": None},
            {"prompt": "x", "timeout": 5})]
        for text, code in bad:
            self.write("in", [{"prompt": "first"}, text, b"last\n"])
            with self.subTest(text=text), self.serve(forever=reply_echo) as server:
                self.cli("-q", "-i", "in", "-o", "out", expect=1)
                error = self.results()[1]["error"]
                self.assertEqual((error["code"], error["line"]), (code, 2))
                self.assertEqual([text for _, text in self.answers()], ["first", code, "last"])
                os.unlink("out")
                self.cli("--dry-run", "-i", "in", expect=1)
                self.assertIn("3 rows, 1 bad", self.err)
                self.assertIn(error["message"][:18], self.err)
                self.assertEqual(len(server.requests), 2)

    def test_that_cannot_be_meant_are_refused(self):
        """Files of another kind, ids of no use and empty prompts end the run; nothing is sent."""
        document = [{"custom_id": "a", "prompt": "x"}, {"custom_id": "b", "prompt": "y"}]
        for data, words in (
                ("Say hello.\nBye.\n".encode("utf-16"), "UTF-16"),
                ("Say hello.\nBye.\n".encode("utf-16-le"), "UTF-16"),
                ('{"prompt": "x"}\n'.encode("utf-16-be"), "UTF-16"),
                ("Say hello.\n".encode("utf-32"), "UTF-16"),
                (gzip.compress(b"Say hello.\n"), "packed"), (b"PK\3\4\x14\0zip", "packed"),
                (lzma.compress(b"Say hello.\n"), "packed"),
                (json.dumps(document, indent=2).encode(), "JSON document"),
                (json.dumps(document).encode(), "JSON document"), (b'["a",\n"b"]\n', "document"),
                (json.dumps(document[0], indent=2).encode(), "JSON document"),
                (b'id,prompt\n1,"Hello, you"\n2,"So ""it"" is, then"\n', "CSV"),
                (b'{"custom_id": 1001.0, "prompt": "x"}\n', "line-1.*custom_id.*1001.0"),
                (b'plain\n{"custom_id": true, "prompt": "x"}\n', "line-2.*custom_id.*True"),
                (b'{"prompt": "x"}\n{"prompt": " "}\n', "line-2.*empty"),
                (b'{"messages": [{"role": "user", "content": ""}]}\n', "line-1.*empty"),
                (b"".join(map(line, rows(2) * 2)), "'r0'"),
                (b'x\n{"custom_id": "line-1", "prompt": "y"}\n', "'line-1'")):
            with self.subTest(data=data[:40]), self.serve():
                self.write("in", [data])
                self.cli("-i", "in", "-o", "out", expect=2)
                self.assertRegex(self.err, "(?s)error: .*" + words)
                self.cli("-", stdin=data, expect=2)
        with self.serve():
            self.cli("a", "", expect=2)
            self.assertIn("empty", self.err)
            self.finish(self.start("-"), 2, stdin="Say hello.\n".encode("utf-16"))
        with self.serve(forever=reply_echo):  # quotes alone make no CSV
            for text in (b'"To be", who said "or not"?\n', b'Who said "I have a dream"?\n'):
                self.cli("-", stdin=text * 2)

    def test_come_from_a_pipe_too(self):
        """A pipe is read as it comes: the first results are out before its end."""
        with self.serve(forever=reply_echo):
            process = self.start("-i", "-", "-o", "-")
            process.stdin.write(b"".join(map(line, rows(2))))
            process.stdin.flush()
            for name in ("r0", "r1"):
                row = json.loads(process.stdout.readline().decode())
                self.assertEqual(row["custom_id"], name)
            out = self.finish(process, 1, stdin=line(rows(1)[0]) + line(rows(1, 2)[0])).decode()
        self.assertEqual([json.loads(row)["error"] is None for row in out.splitlines()],
                         [False, True])

    def test_have_models_fields_and_a_system_message(self):
        """-m and --param fill what a row leaves open; --system precedes its prompt."""
        self.write("in", [{"prompt": "x"}, {"prompt": "y", "model": "own", "top_p": 1}])
        with self.serve(reply("1"), reply("2")) as server:
            self.cli("-c", "1", "-i", "in", "--system", "Be kind.", "--param", "top_p=0.5",
                     "--param", "stop=[1]", "--param", "user=me")
        system = {"role": "system", "content": "Be kind."}
        self.assertEqual([request.body for request in server.requests], [
            {"model": model, "top_p": top_p, "stop": [1], "user": "me", "messages": [
                system, {"role": "user", "content": text}]}
            for model, top_p, text in (("m", 0.5, "x"), ("own", 1, "y"))])


class OutputRows(CommandLine):

    def test_have_the_batch_format(self):
        """Four keys; a failure is told both in response.body and in error."""
        refusal = {"error": {"message": "no", "code": "odd", "type": "t", "param": None}}
        answer = {"model": "m-2024", "choices": [{"message": {"content": "yes"}}], "x": [1]}
        head = {"x-request-id": "q1"}
        for script, response, error in (
                (status(200, answer, head), {"status_code": 200, "request_id": "q1",
                                             "body": answer}, None),
                (status(400, refusal, head), {"status_code": 400, "request_id": "q1",
                                              "body": refusal}, "odd"),
                (status(404, {"detail": "x"}), {"status_code": 404, "request_id": "ours",
                                                "body": {"detail": "x"}}, "http_404"),
                (HANG_UP, None, "connection_error"), (stall(), None, "timeout")):
            with self.subTest(error=error), self.serve(script):
                self.write("in", rows(1))
                row = json.loads(self.cli("-q", "-i", "in", "--timeout", "0.2",
                                          expect=int(bool(error))).decode())
                self.assertEqual(sorted(row), ["custom_id", "error", "id", "response"])
                self.assertRegex(row["id"], "^batch_req_[0-9a-f]{16}_[0-9a-f]{16}$")
                if response and response["request_id"] == "ours":  # as the server gave none
                    response["request_id"] = row["id"]
                self.assertEqual(row["response"], response)
                self.assertEqual(row["error"] and row["error"]["code"], error)
                self.assertIsInstance(row["error"] and row["error"]["message"], (str, type(None)))
        with self.serve(status(502, "<html>" + "x" * (1 << 20))):
            row = self.cli("-q", "-i", "in", expect=1)
        self.assertLess(len(row), 80 << 10)
        self.assertIn("error", json.loads(row.decode())["response"]["body"])

    def test_are_in_the_order_of_the_input(self):
        """Whatever is answered first: the file, and a pipe, have the rows in order."""
        def late(request):
            if request.prompt == "p0":
                server.await_requests(8)
            return status(400, "no") if request.prompt == "p3" else reply_echo(request)
        expected = [("r%d" % n, "http_400" if n == 3 else "p%d" % n) for n in range(9)]
        self.write("in", rows(9))
        with self.serve(forever=late) as server:
            self.cli("-i", "in", "-o", "out", expect=1)
            self.assertEqual(self.answers(), expected)
        with self.serve(forever=late) as server:
            self.write("piped", [self.cli("-i", "in", "-o", "-", expect=1)])
            self.assertEqual(self.answers("piped"), expected)
        self.assertEqual(sorted(os.listdir(".")), ["in", "out", "piped"])

    def test_wait_for_a_slow_one_in_bounds(self):
        """In a pipe a result waits for those before it: 16 for each request in flight."""
        self.write("in", rows(80))
        asked = []

        def late(request):
            if request.prompt == "p0":
                self.until(lambda: len(server.requests) > 20)
                time.sleep(0.2)  # room for more
                asked.append(len(server.requests))
            return reply_echo(request)
        with self.serve(forever=late) as server:
            self.cli("-c", "2", "-i", "in", "-o", "-")
        self.assertTrue(20 < asked[0] <= 33, asked)


class AResumedRun(CommandLine):

    def setUp(self):
        super().setUp()
        self.write("in", rows(4))

    def refused(self, *argv, words="", out="out"):
        """The run ends with status 2, sends nothing and changes nothing."""
        before = {name: self.read(name) for name in os.listdir(".")}
        with self.serve():
            self.cli(*(argv or ("-i", "in", "-o", out)), expect=2)
        self.assertEqual({name: self.read(name) for name in before}, before)
        self.assertIn(words, self.err)

    def test_asks_only_what_is_missing_or_failed(self):
        """The same command again sends the rest; then nothing."""
        odd = lambda request: (  # noqa: E731
            status(400, "no") if request.prompt in ("p1", "p3") else reply(request.prompt[1:]))
        with self.serve(forever=odd):
            self.cli("-i", "in", "-o", "out", expect=1)
        self.assertIn("to go on: %s " % sys.executable, self.err)
        with self.serve(forever=reply_echo) as server:
            self.cli("-c", "1", "-i", "in", "-o", "out")
            self.assertEqual(sorted(request.prompt for request in server.requests), ["p1", "p3"])
        self.assertEqual(self.answers(), [("r0", "0"), ("r1", "p1"), ("r2", "2"), ("r3", "p3")])
        before = self.read("out")
        with self.serve():
            self.cli("-i", "in", "-o", "out")
        self.assertEqual(self.read("out"), before)

    def test_knows_a_failure_in_every_shape(self):
        """The odd rows of OpenAI, vLLM and others are asked again; answers are kept as they are."""
        def said(body, code=200):
            return {"response": {"status_code": code, "request_id": "", "body": body}}
        for failed, fields in (
                (True, said({"error": {"message": "no"}}, 400)),
                (True, {"response": None, "error": {"code": "batch_expired", "message": "x"}}),
                (True, {"response": None, "error": {"code": "batch_cancelled", "message": "x"}}),
                (True, dict(said(None, 400), error={"error": {"message": "x", "code": 400}})),
                (True, dict(said(None, 400), error="The model does not support Chat")),
                (True, said({}, 0)), (True, said({})), (True, said(None)),
                (True, said({"error": {"message": "no"}})), (True, {"response": None}),
                (True, {"response": []}), (True, {"error": {"code": "x", "message": "y"}}),
                (True, said({"choices": []}, [])), (False, {})):
            with self.subTest(fields=fields):
                kept = line(result("r0", **fields))
                self.write("out", [kept] + [result("r%d" % n) for n in (1, 2, 3)])
                with self.serve(*[reply("new")] * failed):
                    self.cli("-i", "in", "-o", "out")
                self.assertEqual(self.read("out").startswith(kept), not failed)
                self.assertEqual([row["custom_id"] for row in self.results()],
                                 ["r0", "r1", "r2", "r3"])
        self.write("out", [result("r0"), result("r0", response=None)] + [
            result("r%d" % n) for n in (1, 2, 3)])
        with self.serve():  # answered once is answered
            self.cli("-i", "in", "-o", "out")
        self.assertEqual(self.answers(), [("r%d" % n, "old") for n in range(4)])

    def test_reads_an_end_that_was_torn_or_has_no_newline(self):
        """Half a row is asked again, a whole one without its newline, or behind a mark, is not."""
        with self.serve(forever=reply_echo):
            self.cli("-i", "in", "-o", "out")
        whole = self.read("out")
        last = whole.rindex(b"\n", 0, -1) + 1
        for cut, asked in ((len(whole) - 1, 0), (len(whole) - 2, 1), (last + 9, 1), (last, 1),
                           (last - 1, 1), (9, 4), (1, 4), (0, 4)):
            with self.subTest(cut=cut), self.serve(forever=reply_echo) as server:
                self.write("out", [whole[:cut]])
                self.cli("-i", "in", "-o", "out")
                self.assertEqual(len(server.requests), asked)
                self.assertEqual(self.read("out").rstrip(b"\n"), whole.rstrip(b"\n"))
        self.write("out", [BOM + whole])
        with self.serve():
            self.cli("-i", "in", "-o", "out")

    def test_leaves_a_file_that_is_not_its_own(self):
        """Notes, requests, other JSON and results of other rows are refused, and stay."""
        self.write("other", [result("r9")])
        self.write("requests", rows(4))
        for number, data in enumerate((b"my notes", b"my\nnotes\n", b"my\nnotes", b'{"a": 1}',
                                       b'{"a": 1}\n', b"[1, 2]", b"\x00\x01", b"\n\n",
                                       self.read("other"), self.read("requests"))):
            with self.subTest(data=data):
                self.write("file", [data])
                self.refused(out="file")
        with self.serve(forever=reply_echo):
            self.cli("-i", "in", "-o", "out")
        self.refused("-i", "out", "-o", "in")  # the two confused

    def test_refuses_what_has_changed(self):
        """A custom_id that now asks something else, be it by its row, by a setting, or in a row of
        version 1.0, ends the run; from a pipe, nothing is lost. What failed may be mended."""
        command = ("--system", "s", "-i", "in", "-o", "out")
        with self.serve(forever=lambda request: (
                status(400) if request.prompt == "p3" else reply_echo(request))):
            self.cli(*command, expect=1)
        for argv in (("-m", "n"), ("--system", "t"), ("--system", ""), ("--param", "n=1")):
            self.refused(*command, *argv, words="'r0' asked something else. Name another -o, or ")
        for values in ([dict(rows(1)[0], prompt="changed")] + rows(3, 1), rows(3)):
            self.write("in", values)
            self.refused(*command, words="another input")
        with self.serve(forever=reply_echo):
            process = self.start("-i", "-", *command[:2], "-o", "out")
            process.communicate(line(dict(rows(1)[0], prompt="changed")), TIMEOUT)
        self.assertEqual([name for name, text in self.answers() if text == "p" + name[1:]],
                         ["r0", "r1", "r2"])
        self.write("in", rows(3) + [dict(rows(4)[3], prompt="mended")])
        with self.serve(reply("yes")):
            self.cli(*command)
        self.write("out", [result("r%d" % n, id="batch_req_0123456789abcdef") for n in range(4)])
        self.refused()

    def test_refuses_an_output_that_is_the_input(self):
        """By whatever name it is called."""
        os.symlink("in", "soft")
        os.link("in", "hard")
        for name in ("in", "soft", "hard", os.path.abspath("in")):
            with self.subTest(name=name):
                self.refused(out=name)
        before = self.read("in")
        with open("in", "ab") as out:  # python3 cometlimit.py -i in >> in
            self.finish(self.start("-i", "in", "-o", "-", stdout=out), 2)
        self.assertIn("is the input", self.err)
        self.assertEqual(self.read("in"), before)

    def test_waits_for_no_other_run(self):
        """A file that a run writes to cannot be another's."""
        with self.serve(forever=lambda request: stall()) as server:
            self.start("-i", "in", "-o", "out", stdin=subprocess.DEVNULL)
            server.await_requests(4)
            os.environ["COMETAPI_BASE_URL"] = "http://127.0.0.1:9/v1"
            self.cli("-i", "in", "-o", "out", expect=2)
            self.assertIn("another run", self.err)


class AnAccident(CommandLine):

    def test_of_sigkill_costs_what_was_in_flight(self):
        """Killed again and again: every answer once, none asked for again, few paid twice."""
        count, width, asked = 40, 4, []

        def answer(request):
            time.sleep(0.002)
            asked.append(request.prompt)
            return reply_echo(request)
        self.write("in", rows(count))
        with self.serve(forever=answer) as server:
            for kill in range(2):
                known, before = re.findall(rb'"(r\d+)", "response": {', self.kept()), len(asked)
                process = self.start("-c", str(width), "-q", "-i", "in", "-o", "out",
                                     stdin=subprocess.DEVNULL)
                end = time.monotonic() + TIMEOUT
                while len(asked) < before + 6 + kill and time.monotonic() < end:
                    time.sleep(0.003)
                process.kill()
                process.wait()
                self.assertFalse({"p" + name.decode()[1:] for name in known} & {*asked[before:]})
            self.cli("-c", str(width), "-i", "in", "-o", "out")
        self.assertEqual(self.answers(), [("r%d" % n, "p%d" % n) for n in range(count)])
        self.assertLessEqual(len(asked), count + 2 * width)
        self.assertLessEqual(server.peak, 2 * width)  # the killed one's last may still be counted

    def kept(self):
        return self.read("out") if os.path.exists("out") else b""

    def test_of_a_full_disk_leaves_whole_rows(self):
        """The run stops, resumable, with whole rows; with room again it is finished."""
        limit = ("import os, resource, sys\n"
                 "resource.setrlimit(resource.RLIMIT_FSIZE, (1444, 1444))\n"
                 "os.execv(sys.argv[1], sys.argv[1:])")
        self.write("in", rows(20))
        with self.serve(forever=reply_echo) as server:
            self.finish(self.start("-i", "in", "-o", "out", wrap=(sys.executable, "-c", limit)), 3)
            self.assertIn("cannot be written", self.err)
            self.assertTrue(0 < self.read("out").count(b"\n") == len(self.results()) < 20)
            server.requests.clear()
            kept = len(self.results())
            self.cli("-i", "in", "-o", "out")
            self.assertEqual(len(server.requests), 20 - kept)
        self.assertEqual(self.answers(), [("r%d" % n, "p%d" % n) for n in range(20)])

    @unittest.skipUnless(os.path.exists("/dev/full"), "there is no /dev/full")
    def test_of_a_full_device_is_told(self):
        """Whichever file is full: no traceback, no answer lost, and never the status of success."""
        self.write("in", rows(3))
        with self.serve(forever=reply_echo), open("/dev/full", "wb") as full:
            processes = self.start("-i", "in", stdout=full), self.start(
                "-i", "in", "-o", "out", "--joblog", "/dev/full", stderr=full)
            self.cli("-i", "in", "-o", "/dev/full", expect=3)
            self.finish(processes[0], 3)
            self.finish(processes[1], 0)
            self.finish(self.start("-i", "in", "-o", "other", "--joblog", "/dev/full"), 0)
            self.assertEqual(self.err.count("job log cannot"), 1)
        self.assertTrue(self.answers())

    def test_of_a_reader_that_leaves_is_no_failure(self):
        """`| head -1` ends the run quietly."""
        self.write("in", rows(200))
        with self.serve(forever=reply_echo) as server:
            process = self.start("-i", "in")
            process.stdout.readline()
            process.stdout.close()
            process.stdout = None
            self.finish(process, 141)
            self.assertLess(len(server.requests), 200)
        self.assertEqual(self.err, "")

    def test_of_closed_standard_streams(self):
        """Without stdout there is nowhere to answer to; stdin and stderr are not needed."""
        with self.serve(reply("yes"), reply("yes")):
            cases = [(self.start(*argv, wrap=("sh", "-c", 'exec "$@" ' + closed, "sh")), expect)
                     for closed, argv, expect in (
                         ("<&- 2>&-", ("a",), 0), ("<&- >&- 2>&-", ("a",), 2),
                         ("<&- >&- 2>&-", ("a", "-o", "out"), 0), ("<&-", ("-",), 2))]
            for process, expect in cases:
                self.finish(process, expect)
        self.assertEqual(self.answers(), [("line-1", "yes")])

    def test_of_a_locale_without_letters(self):
        """LC_ALL=C changes neither the prompts nor the answers."""
        os.environ.update(LC_ALL="C", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
        os.environ.pop("PYTHONIOENCODING", None)
        with self.serve(forever=reply_echo) as server:
            out = self.finish(self.start("-q", "--system", "é".encode(), "--param",
                                         "user=ü".encode(), "Grüße 漢".encode()), 0)
        self.assertEqual(server.requests[0].prompt, "Grüße 漢")
        self.assertEqual((server.requests[0].body["messages"][0]["content"],
                          server.requests[0].body["user"]), ("é", "ü"))
        self.assertEqual(out.decode(), '["Grüße 漢"]\n')


class ASignal(CommandLine):

    def test_lets_what_is_in_flight_come_back(self):
        """Nothing more is sent, not even again; what was sent is written; 128 + N."""
        def late(request):
            self.until(lambda: len(runs) == 3 and all(len(run[0].requests) == 2 for run in runs))
            time.sleep(0.4)
            return status(503) if request.prompt == "p1" else reply_echo(request)
        runs = []
        self.write("in", rows(50))
        with contextlib.ExitStack() as stack:
            for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)):
                server = stack.enter_context(self.serve(forever=late))
                runs.append((server, number, code, self.start(
                    "-c", "2", "--max-retries", "4", "-i", "in", "-o", "out%d" % code)))
            for server, _, _, _ in runs:
                server.await_requests(2)
            for _, number, _, process in runs:
                process.send_signal(number)
            for server, _, code, process in runs:
                self.finish(process, code)
                self.assertEqual(len(server.requests), 2)
                self.assertEqual(self.answers("out%d" % code)[0], ("r0", "p0"))
                self.assertIn("to go on", self.err)

    def test_that_comes_twice_ends_at_once(self):
        """The second one waits for nothing; the file stays good."""
        with self.serve(reply("0"), stall(), stall()) as server:
            self.write("in", rows(9))
            process = self.start("-c", "1", "-i", "in", "-o", "out")
            server.await_requests(2)
            process.send_signal(signal.SIGINT)
            time.sleep(0.2)
            self.assertIsNone(process.poll())
            began = time.monotonic()
            process.send_signal(signal.SIGINT)
            self.finish(process, 130)
            self.assertLess(time.monotonic() - began, 1.0)
            server.script.clear()
        self.assertEqual(self.answers(), [("r0", "0")])

    def test_needs_no_end_of_the_input(self):
        """A run whose stdin stays open, or is still being read, ends as cleanly."""
        cases = [("fifo1",), ("fifo2", "--dry-run"), ("fifo3", "--shard", "1/1")]
        for name, *_ in cases:
            os.mkfifo(name)
        cases = [(name, self.start("-i", name, *argv)) for name, *argv in cases]
        with self.serve(reply("yes")) as server:
            process = self.start("-o", "out")
            process.stdin.write(b"a\n")
            process.stdin.flush()
            server.await_requests(1)
            time.sleep(0.2)
            process.send_signal(signal.SIGINT)
            process.wait(TIMEOUT)  # stdin is closed later
            self.finish(process, 130)
        with contextlib.ExitStack() as stack:
            for name, _ in cases:
                stack.enter_context(open(name, "wb"))  # which waits for its reader
            time.sleep(0.1)
            for name, process in cases:
                process.send_signal(signal.SIGTERM if name == "fifo2" else signal.SIGINT)
            for name, process in cases:
                process.wait(5)
                self.finish(process, 143 if name == "fifo2" else 130)

    def test_is_ignored_where_it_was(self):
        """As under nohup, or behind an & of a shell: it ends nothing."""
        ignoring = ("import os, signal, sys\nfor n in (1, 2): signal.signal(n, signal.SIG_IGN)\n"
                    "os.execv(sys.argv[1], sys.argv[1:])")
        self.write("in", rows(2))
        with self.serve(forever=lambda request: time.sleep(0.2) or reply_echo(request)) as server:
            process = self.start("-i", "in", "-o", "out", wrap=(sys.executable, "-c", ignoring))
            server.await_requests(1)
            process.send_signal(signal.SIGHUP)
            process.send_signal(signal.SIGINT)
            self.finish(process, 0)

    def test_leaves_a_few_seconds_to_what_is_in_flight(self):
        """What has not come back by then is given up, and left to the next run."""
        self.write("in", rows(3))
        with self.serve(forever=lambda request: (
                reply_echo(request) if request.prompt == "p0" else stall())):
            kill = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM))
            kill.start()
            with unittest.mock.patch.object(cometlimit, "_GRACE", 0.3):
                began = time.monotonic()
                self.cli("-i", "in", "-o", "out", expect=143)
            self.assertTrue(0.4 < time.monotonic() - began < 3.0)
            kill.join()
        self.assertEqual(self.answers(), [("r0", "p0")])
        self.assertIn("stopped: SIGTERM", self.err)


class AStop(CommandLine):

    NO = {401: "no", 402: {"error": {"code": "insufficient_quota"}},
          403: "no", 404: {"error": {"code": "model_not_found"}},
          503: {"error": {"code": "model_not_found"}}, 200: "<html>", 302: "",
          429: {"error": {"code": "insufficient_quota"}}}

    def test_comes_where_rows_from_everywhere_fail_alike(self):
        """A wrong key or URL, an unknown model or no money: after ten rows, and 3."""
        self.write("in", rows(40))
        for code, body in self.NO.items():
            tired = self.tiring(status(code, body), 10)
            with self.subTest(code=code), self.serve(forever=tired) as server:
                self.cli("-i", "in", "-o", "out", expect=3)
                asked = [int(request.prompt[1:]) for request in server.requests]
                self.assertTrue(10 <= len(asked) <= 18, asked)
                self.assertGreater(max(asked), 20)  # some lie far on
                self.assertRegex(self.err, "stopped: rows of m fail alike: .*\n")
                os.unlink("out")

    def test_comes_not_for_rows_that_fail_in_a_heap(self):
        """What a filter refuses stands together: the others are answered, in the first run."""
        self.write("in", rows(60))
        flagged = lambda request: (  # noqa: E731
            status(403, "flagged") if int(request.prompt[1:]) < 30 else reply_echo(request))
        for source in ("in", "-"):  # a pipe cannot be read ahead for ever
            with self.subTest(source=source), self.serve(forever=flagged):
                self.cli("-i", source, "-o", "out", pipe=self.read("in"), expect=1)
                self.assertEqual([text for _, text in self.answers()],
                                 ["http_403"] * 30 + ["p%d" % n for n in range(30, 60)])
                os.unlink("out")

    def test_comes_to_one_model_alone(self):
        """A model that is gone keeps none of the others' rows from being answered: 1."""
        self.write("in", [dict(row, model="gone" if n < 110 else "here")
                          for n, row in enumerate(rows(140))])
        gone = status(404, self.NO[404])
        with self.serve(forever=lambda request: gone if request.body["model"] == "gone" else (
                reply_echo(request))) as server:
            self.cli("-i", "in", "-o", "out", expect=1)
            self.assertLess(len(server.requests), 50)
            self.assertEqual(sum(text[0] == "p" for _, text in self.answers()), 30)
            self.assertRegex(self.err, r"\b(100|9\d) left.*\n.*stopped: rows of gone")
            self.write("piped", [self.cli("-i", "in", "-o", "-", expect=1)])
            self.assertEqual(self.answers("piped")[-30:],
                             [("r%d" % n, "p%d" % n) for n in range(110, 140)])

    def test_comes_where_no_model_is_there(self):
        """A wrong key in a file of many models: three of them are tried, and 3."""
        self.write("in", [dict(row, model="m%d" % (n % 20)) for n, row in enumerate(rows(400))])
        tired = self.tiring(status(401, "bad key"), 120)
        with self.serve(forever=tired) as server:
            self.cli("-i", "in", "-o", "out", expect=3)
            self.assertLess(len(server.requests), 200)
        self.assertIn("stopped: rows of m", self.err)

    def test_has_patience_with_failures_that_may_pass(self):
        """Fifty samples, where a server that has answered is down for a while."""
        self.write("in", rows(80))
        count = itertools.count()
        with self.serve(forever=lambda request: (
                status(500) if 5 <= next(count) < 45 else reply_echo(request))) as server:
            self.fast_clock(1000.0)
            self.cli("-c", "2", "-i", "in", "-o", "out", expect=1)
            self.assertEqual(len(server.requests), 80)

    def test_comes_where_no_server_is(self):
        """A server that is never reached: the reason is told, and the run ends, resumable."""
        self.write("in", rows(40))
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            place = "127.0.0.1:%d" % closed.getsockname()[1]
            os.environ["COMETAPI_BASE_URL"] = "http://%s/v1" % place
            self.fast_clock(50.0)
            self.cli("-i", "in", "-o", "out", expect=3)
            self.assertIn("no connection to " + place, self.err)
            with unittest.mock.patch.multiple(cometlimit, _UNREACHED=0.006, _PLAIN=0.05):
                self.real_time()
                self.cli("--max-retries", "9", "-i", "in", "-o", "out", expect=3)
            self.assertRegex(self.err, "0/40 done, no connection to %s, 0.0/s\n" % place)
            self.assertRegex(self.err, "never reached: no connection to %s\n" % place)

    def test_comes_at_once_with_a_wish_for_hours(self):
        """A daily limit is not tried again and again: 3, and the hour to come back at."""
        self.write("in", rows(40))
        daily = status(429, "x", {"Retry-After": "27780"})
        with self.serve(forever=lambda request: (
                reply_echo(request) if request.prompt == "p0" else daily)) as server:
            self.cli("--max-retries", "4", "-i", "in", "-o", "out", expect=3)
            self.assertLess(len(server.requests), 12)
        self.assertRegex(self.err, r"stopped: .*come back at \d\d:\d\d\n")
        self.assertEqual(self.answers(), [("r0", "p0")])  # the others are left

    def test_comes_when_the_tokens_are_used(self):
        """--max-tokens-total: 3, and how many were used; none of a file's earlier runs count."""
        self.write("in", rows(30))
        with self.serve(forever=reply_echo) as server:
            self.cli("-c", "1", "--max-tokens-total", "22", "-i", "in", "-o", "out", expect=3)
            self.assertTrue(5 <= len(server.requests) <= 7)
            self.assertRegex(self.err, r"stopped: \d\d tokens were used")
            self.cli("-i", "in", "-o", "out")
        self.assertRegex(self.err, r"tokens: 1\d\d in this run, 150 in all of ")


class AnOption(CommandLine):

    def test_shard_divides_the_input(self):
        """The shards of N have every row once."""
        self.write("in", rows(5) + [b"\n", b"plain\n"])
        with self.serve(forever=reply_echo):
            for number in (1, 2):
                self.cli("--shard", "%d/2" % number, "-i", "in", "-o", "out%d" % number)
        shards = [[name for name, _ in self.answers("out%d" % number)] for number in (1, 2)]
        self.assertEqual(sorted(sum(shards, [])), ["line-7", "r0", "r1", "r2", "r3", "r4"])
        self.assertEqual([len(shard) for shard in shards], [3, 3])

    def test_dry_run_sends_nothing(self):
        """The input is checked, without a key and from a pipe too; no file is made."""
        del os.environ["COMETAPI_KEY"]
        self.write("in", rows(3) + [{"prompt": "x", "model": "own"}])
        with self.serve():
            self.cli("--dry-run", "-i", "in", "-o", "out")
            self.assertIn("4 rows, 0 bad; by model: m x 3, own x 1; 0 answered already; 1",
                          self.err)
            self.finish(self.start("--dry-run"), 0, stdin=b"a\nb\n")
            self.assertIn("2 rows, 0 bad", self.err)
        self.assertEqual(os.listdir("."), ["in"])

    def test_joblog_tells_every_attempt(self):
        """A JSON line for each, appended."""
        self.write("in", rows(1))
        cometlimit._wait, cometlimit._now = self.wait, lambda: self.now  # nothing is waited for
        with self.serve(status(429, "x"), reply("yes"), reply("yes")):
            self.cli("--max-retries", "1", "-i", "in", "--joblog", "log")
            self.cli("-i", "in", "--joblog", "log")
        self.assertEqual([tuple(row[name] for name in ("status", "attempt", "model", "route"))
                          for row in self.results("log")], [
            (code, attempt, "m", "/v1/chat/completions")
            for code, attempt in ((429, 1), (200, 2), (200, 1))])
        before = self.read("in")
        with self.serve():
            self.cli("-i", "in", "-o", "out", "--joblog", "in", expect=2)
        self.assertEqual(self.read("in"), before)

    def test_never_shows_the_key(self):
        """Nor is there an option for it: an attempt at one is refused, without its value."""
        for argv in (("--api-key", KEY, "a"), ("--api-key=" + KEY, "a"), ("a", "--key=" + KEY)):
            with self.subTest(argv=argv), self.serve():
                self.cli(*argv, expect=2)
                self.assertNotIn(KEY, self.err)
        with self.serve(reply("yes")) as server:
            self.cli("a", "--joblog", "log")
            self.assertEqual(server.requests[0].headers["authorization"], "Bearer " + KEY)
            del os.environ["COMETAPI_KEY"]
            self.cli("a", "--base-url", "https://127.0.0.1:9/v1", expect=2)
            self.assertEqual(self.err, "cometlimit: error: there is no API key: "
                                       "set COMETAPI_KEY\n")
        self.assertNotIn(KEY.encode(), self.read("log"))

    def test_header_goes_with_each_request(self):
        """Its own login in the place of the key's; a command with secrets is not shown again."""
        with self.serve(forever=lambda request: status(400)) as server:
            self.write("in", rows(1))
            self.cli("--header", "Authorization: Basic c2VjcmV0", "--header", "X-Team:a:b",
                     "-i", "in", "-o", "out", expect=1)
            headers = server.requests[0].headers
        self.assertEqual((headers["authorization"], headers["x-team"]), ("Basic c2VjcmV0", "a:b"))
        self.assertNotIn("c2VjcmV0", self.err)
        self.assertIn("to go on: the same command", self.err)

    def test_param_takes_json_words_and_files(self):
        """What cannot be meant as JSON is a text; what is broken JSON is refused."""
        self.write("f.json", [BOM + b'{"type": ["\xc3\xa9"]}\n'])
        self.write("f.txt", [b"Be brief.\nAnd kind.\n"])
        for text, value in (("0.5", 0.5), ("[1]", [1]), ("high", "high"), ("a b", "a b"),
                            ('"7"', "7"), ("true", True), ("null", None), ("gpt-4o", "gpt-4o"),
                            ("@f.json", {"type": ["é"]}), ("@f.txt", "Be brief.\nAnd kind."),
                            ("a=b", "a=b")):
            with self.subTest(text=text), self.serve(reply("yes")) as server:
                self.cli("--param", "x=" + text, "a")
                self.assertEqual(server.requests[0].body.get("x"), value)
        for text in ("{'single': 'quotes'}", '{"a": 1', "[1", "'x'", "True", "None", "NaN", "0,5",
                     "@missing", "", "-Infinity"):
            with self.subTest(text=text), self.serve():
                self.cli("--param", "x=" + text, "a", expect=2)
        with self.serve(reply("yes")) as server:
            self.cli("--system", "@f.txt", "a")
            self.assertEqual(server.requests[0].body["messages"][0]["content"],
                             "Be brief.\nAnd kind.")

    def test_max_rate_and_skip_failed_and_max_retries(self):
        """They do what they say."""
        self.write("in", rows(3))
        with self.serve(forever=lambda request: status(
                {"p0": 400, "p1": 500, "p2": 401}[request.prompt])) as server:
            self.cli("--max-rate", "50", "-i", "in", "-o", "out", expect=1)
            times = sorted(request.time for request in server.requests)
        self.assertGreater(times[2] - times[0], 0.03)
        with self.serve(forever=reply_echo) as server:
            self.cli("--skip-failed", "-i", "in", "-o", "out", expect=1)
            self.assertEqual(sorted(request.prompt for request in server.requests), ["p1", "p2"])
            self.cli("--skip-failed", "-i", "in", "-o", "out", expect=1)
            self.assertEqual(len(server.requests), 2)
            self.cli("-i", "in", "-o", "out")
        self.assertEqual([text for _, text in self.answers()], ["p0", "p1", "p2"])

    def test_that_cannot_be_ends_with_2(self):
        """Before anything is sent or made: in two lines at most, in words of the command line."""
        self.write("in", rows(1))
        https = ("--base-url", "https://127.0.0.1:9/v1")
        for words, *argv in (
                ("--max-concurrency is a", "-c", "0"), ("--max-rate is a", "--max-rate", "0"),
                ("--max-retries is", "--max-retries", "-1"), ("--timeout is a", "--timeout", "nan"),
                ("see --help", "--param", "timeout=5"), ("--header is", "--header", "x"),
                ("--allow-http", "--base-url", "http://example.org/v1"), ("-c", "-c", "x"),
                ("--ca-file", "--ca-file", "no") + https, ("Host", "--header", "Host: x"),
                ("--joblog", "--joblog", ""), ("--text", "--text", "-o", "out"), ("", "-m", ""),
                ("", "--shard", "0/2"), ("", "--shard", "3/2"), ("", "--shard", "x"),
                ("", "--param", "x"), ("", "--param", "=1"), ("", "-o", ""), ("", "-i", ""),
                ("", "--base-url", "x"), ("", "-i", "."), ("", "--no-such"), ("", "-o", "."),
                ("", "-i", "missing"), ("", "-o", "no/such"), ("", "--joblog", "no/such"),
                ("", "prompt")):
            with self.subTest(argv=argv), self.serve():
                self.cli("-i", "in", *argv, expect=2)
                self.assertRegex(self.err, "error: .*" + words)
                self.assertNotRegex(self.err, r"max_|allow_|ca_file|Client|\w=\)")
                self.assertLessEqual(self.err.count("\n"), 2)
        with self.serve():
            os.environ["COMETAPI_KEY"] = "a b"
            self.cli("a", expect=2)
        self.assertEqual(os.listdir("."), ["in"])

    def test_quiet_leaves_only_what_failed(self):
        """-q shows neither progress nor summary; without it stdout has still but the answers."""
        with self.serve(forever=reply("yes")):
            self.assertEqual(self.cli("-q", "a"), b'["yes"]\n')
            self.assertEqual(self.err, "")
            self.assertEqual(self.cli("a"), b'["yes"]\n')
            self.assertEqual(self.err, "")
            self.write("in", rows(1))
            self.cli("-i", "in", "-o", "out")
            self.assertRegex(self.err, r"(?s)^model .*\nm +1 +1 +0 .*2 in, 3 out.*200 x 1\n"
                                       r"tokens: 5 in this run, 5 in all of .*1 answered")
            self.assertNotRegex(self.err, "[\x1b\r]")

    def test_version_and_help_are_short(self):
        """--help fits two screens of 24 lines and shows three examples."""
        os.environ.update(COLUMNS="80", LINES="24")
        self.assertEqual(self.cli("--version").decode(), "cometlimit %s\n" % cometlimit.__version__)
        text = self.cli("--help").decode()
        self.assertLessEqual(sum(1 + len(row) // 81 for row in text.splitlines()), 48)
        self.assertEqual(len(re.findall(r"^ +python3 cometlimit\.py ", text, re.M)), 3)

    def test_demo_shows_it_all(self):
        """In a few seconds, without key or network, and plain in a pipe: a line a second."""
        out = self.finish(self.demo, 0).decode()
        self.assertRegex(out, r"(?m)^2 s  \d+ answered, \d+ refused(  limit \d+\.?\d*/s)?$")
        self.assertRegex(out, r"(?s)\nmodel .*429 x [1-9].*\n40 answered, 0 lost, \d\.\d s\n$")
        self.assertNotRegex(out + self.err, "[\x1b\r]")


class TheScreen(CommandLine):

    def on_terminal(self, columns, *argv, expect=0, act=None):
        """What a run shows on so many columns: what was drawn, and the lines that stay."""
        master, slave = pty.openpty()
        self.addCleanup(os.close, master)
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        process = self.start("-i", "in", "-o", "out", *argv, stdin=subprocess.DEVNULL, stderr=slave)
        os.close(slave)
        if act is not None:
            act(process)
        shown = b""
        with contextlib.suppress(OSError):
            for data in iter(lambda: os.read(master, 4096), b""):
                shown += data
        self.finish(process, expect)
        drawn = shown.decode().split("\x1b[K\r")
        self.assertLess(max(map(len, drawn[:-1])), columns, drawn)
        self.assertNotIn("\n", "".join(drawn[:-1]))  # the rest comes after it was cleared
        return drawn[:-1], drawn[-1].replace("\r\n", "\n")

    def test_shows_how_far_it_is_within_one_line(self):
        """Less of it on a narrow one; no server's words steer the terminal."""
        self.write("in", rows(20))

        def slow(request):
            time.sleep(0.05)
            n = int(request.prompt[1:])
            return reply_echo(request) if n % 5 else status(400, {
                "error": {"code": "\x1b[31mred", "message": "bad\x9b word"}})
        table = {
            120: r"1\d/20 done, [1-4] failed, 400 \\x1b\[31mred, 0:00:0\d left, \d+\.\d/s",
            40: r"1\d/20 done, [1-4] failed, 400 \\x1b\[31mred$"}
        with self.serve(forever=slow), concurrent.futures.ThreadPoolExecutor() as beside:
            seen = beside.map(lambda columns: self.on_terminal(
                columns, "-c", "1", "-o", "out%d" % columns, expect=1), table)
            for words, (drawn, stays) in zip(table.values(), seen):
                self.assertTrue(3 <= len(drawn) <= 15, drawn)
                self.assertTrue(any(re.match(words, text) for text in drawn), drawn)
                self.assertRegex(stays, r"4 x \\x1b\[31mred \(r0, r5, r10, r15\): HTTP 400 ")
                self.assertLessEqual(max(map(len, stays.split("to go on")[0].split("\n"))), 100)
                self.assertNotRegex(stays + "".join(drawn), "[\x1b\x9b]")

    def test_says_at_once_that_it_stops(self):
        """After Ctrl-C: how many are in flight, and the seconds that they have."""
        self.write("in", rows(20))

        def stop(process):
            server.await_requests(4)
            process.send_signal(signal.SIGINT)
        with self.serve(forever=lambda request: time.sleep(0.5) or reply_echo(request)) as server:
            drawn, stays = self.on_terminal(80, "-c", "4", expect=130, act=stop)
        self.assertIn("stopping: 4 in flight, 5 s", drawn)
        self.assertRegex(stays, "4 answered, 0 failed, 0 kept, 16 left")

    def test_shows_the_last_minutes_rate_and_the_limit(self):
        """Not the mean since the start; refusals by chance are told."""
        options = types.SimpleNamespace(quiet=False, output_file="out")
        screen = cometlimit._Screen(options)
        stats = cometlimit.Stats()
        stats.rate, stats.requests, stats.chance, stats.statuses[429] = 9.76, 200, 6, 6
        client = types.SimpleNamespace(metrics={("/v1", "m"): stats})
        screen.total, start = 5000, screen.began
        for second in range(0, 200, 10):
            screen.answers += 10 if second < 100 else 100
            text = screen._progress(client, start + second, 80)
        self.assertEqual(text, "1100/5000 done, 0:06:30 left, 10.0/s, limit 9.76/s, "
                               "3 % refused by chance")
        screen.failures, screen.trouble, screen.trouble_at = 3, "no connection to h:1", start + 200
        self.assertEqual(screen._progress(client, start + 200, 40),
                         "1103/5000 done, 3 failed, no connection to h:1"[:47])

    def test_sums_up(self):
        """Failures by code with their number, the first one's words and ten ids; odd answers."""
        self.write("in", rows(20))
        odd = {"p0": reply(""), "p1": reply("cut", choices=[
            {"message": {"content": "cut"}, "finish_reason": "length"}]), "p2": reply("fine")}
        with self.serve(forever=lambda request: odd.get(request.prompt, status(
                422, {"error": {"message": "word " * 50}}))):
            self.cli("-c", "1", "-i", "in", "-o", "out", expect=1)
        ids = ", ".join("r%d" % n for n in range(3, 13))
        text = " ".join(self.err.split())
        self.assertIn("17 x http_422 (%s, ...): HTTP 422: word word" % ids, text)
        self.assertIn("answers without text: 1; cut off by a length limit: 1", text)
        self.assertLessEqual(max(map(len, self.err.split("tokens: ")[0].split("\n"))), 80)


class AChange(CommandLine):
    """Files are changed by others while a run goes on."""

    def test_of_a_file_loses_nothing(self):
        """What grows is left to the next run; an output that is gone is written anew; the rest is
        told, and never 0."""
        def answer(request):
            if request.prompt.startswith("p5 ") and not acted:
                acted.append(act())
            time.sleep(0.01)
            return reply(request.prompt.strip())

        def grow():
            with open("in", "ab") as file:
                file.write(line({"custom_id": "new", "prompt": "new"}))
        for act, codes, words, new in (
                (grow, (0, 0), "", [("new", "new")]),
                (lambda: os.truncate("in", 0), (3, 2), "cut short", []),
                (lambda: os.unlink("out"), (0, 0), "was removed or replaced", []),
                (lambda: os.replace("other", "out"), (0, 0), "was removed or replaced", []),
                (lambda: os.truncate("out", 0), (3, 0), "another program has written to", [])):
            acted = []
            self.write("other", [b"other\n"])
            self.write("in", [dict(row, prompt=row["prompt"].ljust(9000)) for row in rows(40)])
            with self.subTest(words=words, codes=codes), self.serve(forever=answer) as server:
                for code, said in zip(codes, (words, "")):
                    self.cli("-c", "4", "-i", "in", "-o", "out", expect=code)
                    self.assertIn(said, self.err)
                expected = [("r%d" % n, "p%d" % n) for n in range(40)] + new
                if codes[1]:
                    self.assertTrue(6 <= len(self.results()) <= 16)
                else:
                    self.assertEqual(self.answers(), expected)
                if not codes[0]:  # nothing is paid twice
                    self.assertEqual(len(server.requests), len(expected))
            os.unlink("out")

    def test_of_the_folder_is_told(self):
        """Where the output cannot be written anew, the status is not 0."""
        os.mkdir("folder")

        def answer(request):
            if len(server.requests) == 5:
                shutil.rmtree("folder")
            return time.sleep(0.3) or reply_echo(request)
        self.write("in", rows(20))
        with self.serve(forever=answer) as server:
            self.cli("-i", "in", "-o", "folder/out", expect=3)
        self.assertIn("cannot be written", self.err)

    def test_of_rows_that_failed_comes_last(self):
        """A resumed run asks new rows first, from a file and from a pipe."""
        self.write("in", rows(30))
        self.write("out", [result("r%d" % n, error={"code": "x", "message": "y"})
                           for n in range(10)])
        first = self.read("out")
        for source in ("in", "-"):
            with self.serve(forever=reply_echo) as server:
                self.write("out", [first])
                self.cli("-c", "1", "-i", source, "-o", "out", pipe=self.read("in"))
                asked = [int(request.prompt[1:]) for request in server.requests]
            self.assertEqual(sorted(asked[-8:]), sorted(set(asked[-8:]) & set(range(10))))
            self.assertEqual(self.answers()[0], ("r0", "p0"))

    def test_of_the_file_system_needs_no_lock(self):
        """Where locks are not to be had: a warning, and on."""
        self.write("in", rows(1))
        for number in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            fails = unittest.mock.patch.object(fcntl, "flock", side_effect=OSError(number, "x"))
            with self.subTest(number=number), fails, self.serve(forever=reply_echo):
                self.cli("-i", "in", "-o", "out", "-q")
                self.assertIn("cannot be locked", self.err)

    def test_of_the_mode_is_none(self):
        """The file keeps its mode when its rows are put into order; nothing else is left."""
        self.write("in", rows(9))
        self.write("out", [])
        os.chmod("out", 0o640)
        sync = unittest.mock.patch.object(os, "fsync", wraps=os.fsync)
        with self.serve(forever=lambda request: (
                time.sleep(0.2 * (request.prompt == "p0")) or reply_echo(request))), sync as sync:
            clock = time.monotonic
            self.replace(time, monotonic=lambda: 10 * clock())
            self.cli("-i", "in", "-o", "out")
        self.assertGreaterEqual(sync.call_count, 4)  # at first, after a second, twice at the end
        self.assertEqual(os.stat("out").st_mode & 0o777, 0o640)
        self.assertEqual([name for name, _ in self.answers()], ["r%d" % n for n in range(9)])
        self.assertEqual(sorted(os.listdir(".")), ["in", "out"])

    def test_of_the_place_in_stdin_is_kept(self):
        """What was read of it before is no row."""
        self.write("in", [b"header\n"] + rows(3))
        with self.serve(forever=reply_echo), open("in", "rb") as file:
            os.read(file.fileno(), 7)
            self.finish(self.start("-o", "out", stdin=file), 0)
        self.assertEqual([name for name, _ in self.answers()], ["r0", "r1", "r2"])


class TheReadme(CommandLine):
    """What the README shows is what happens."""

    ANSWERS = {"Say hello.": "Hello.", "Write a title.": "A Title"}

    def blocks(self, language):
        with open(os.path.join(FOLDER, "README.md"), encoding="utf-8") as file:
            return re.findall("```%s\n(.*?)```" % language, file.read(), re.S)

    def setUp(self):
        super().setUp()
        server = Server(forever=lambda request: reply(
            self.ANSWERS.get(request.body["messages"][-1]["content"], "?")))
        server.__enter__()
        self.addCleanup(server.__exit__, None)
        os.environ["COMETAPI_BASE_URL"] = server.url

    def run_block(self, argv, text):
        done = subprocess.run(argv, input=text.encode(), stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, timeout=TIMEOUT)
        self.assertEqual(done.returncode, 0, done.stderr.decode())
        return done.stdout.decode()

    def test_shows_programs_that_run(self):
        """Each block of Python runs as it stands, and the first one prints what is shown."""
        shown = self.blocks("text")[0]
        with open("questions.csv", "w") as file:
            file.write("question\nSay hello.\n")
        with concurrent.futures.ThreadPoolExecutor() as beside:
            printed = list(beside.map(
                lambda block: self.run_block([sys.executable, "-W", "error", "-"], block),
                self.blocks("python")))
        self.assertTrue(all(printed))
        self.assertEqual(printed[0], shown)

    def test_shows_commands_that_run(self):
        """Each command runs as it stands, with this interpreter for python3."""
        os.mkdir("bin")
        os.symlink(sys.executable, "bin/python3")
        os.symlink(os.path.join(FOLDER, "cometlimit.py"), "cometlimit.py")
        self.write("requests.jsonl", rows(3))
        os.environ["PATH"] = os.path.abspath("bin") + os.pathsep + os.environ["PATH"]
        for block in self.blocks("sh"):
            if "--demo" not in block:  # which AnOption runs
                with self.subTest(block=block):
                    printed = self.run_block(["sh", "-e"], block)
                    if "Say hello" in block:
                        self.assertEqual(json.loads(printed), list(self.ANSWERS.values()))
        self.assertEqual(len(self.results("results.jsonl")), 3)

    def test_knows_every_knob(self):
        """Its table names each of Client's parameters, and no other."""
        with open(os.path.join(FOLDER, "README.md"), encoding="utf-8") as file:
            table = file.read().partition("| `Client(...)` |")[2].partition("\n\n")[0]
        self.assertEqual(re.findall(r"(?m)^\| `(\w+)` \|", table),
                         [name for name in parameters(cometlimit.Client)])


class Bucket:
    """A limiter: so many requests a second, so many at once."""

    def __init__(self, rate, burst):
        self.rate, self.burst, self.level, self.at = rate, burst, burst, 0.0

    def take(self, now):
        self.level = min(self.burst, self.level + (now - self.at) * self.rate)
        self.at, taken = now, self.level >= 1.0 - 1e-9
        self.level -= taken
        return taken


def simulate(limiter, until, clients=1, width=50, status=429, retry_after=None, chance=0.0):
    """Clients with endless work, each with a throttle of its own, share a limiter for a while.

    A limiter without a rate is a cap on concurrency: only ends fill it. Returns the throttles,
    and the times at which requests of each were taken and refused.
    """
    dice, order = random.Random(7), itertools.count()
    throttles = [cometlimit.Throttle(random=dice.random) for _ in range(clients)]
    taken, refused, flying = [[[] for _ in throttles] for _ in range(3)]
    looks = [-1.0] * clients
    events = [(0.001 * n, next(order), None, n, None) for n in range(clients)]
    while events[0][0] < until:
        now, _, tell, n, ticket = heapq.heappop(events)
        throttle = throttles[n]
        if tell == "land":
            passes = dice.random() >= chance and limiter.take(now)
            (taken if passes else refused)[n].append(now)
            tell, after = ("answered", dice.uniform(0.3, 1.7)) if passes else ("refused", 0.02)
            heapq.heappush(events, (now + after, next(order), tell, n, ticket))
            continue
        if tell == "answered":
            limiter.level += not limiter.rate
            throttle.answered(ticket, now)
        elif tell == "refused":
            throttle.refused(ticket, now, status, retry_after)
        if tell:
            flying[n].remove(ticket)
        while len(flying[n]) < width and throttle.wait(now) <= 1e-9:
            flying[n].append(throttle.sent(now))
            heapq.heappush(events, (now + 0.02, next(order), "land", n, flying[n][-1]))
        due = now + throttle.wait(now)
        if len(flying[n]) < width and (looks[n] <= now or due < looks[n]):
            looks[n] = due
            heapq.heappush(events, (due, next(order), None, n, None))
    return throttles, taken, refused


class TheThrottle(unittest.TestCase):
    """The arithmetic, in virtual time: nothing sleeps."""

    def drive(self, throttle, count, takes, now=0.0, retry_after=None):
        """Asks as soon as may be, and hears 0.02 s later: yields the time and the wait before."""
        for number in range(count):
            wait = throttle.wait(now)
            ticket, now = throttle.sent(now + wait), now + wait + 0.02
            if takes(now):
                throttle.answered(ticket, now)
            else:
                throttle.refused(ticket, now, 429, retry_after)
            yield now, wait

    def test_at_most_doubles_its_rate_each_second(self):
        """Before any refusal nothing is known: requests leave faster and faster."""
        (throttle,), (taken,), _ = simulate(Bucket(1e6, 1e6), 4.9, width=1000)
        counts = collections.Counter(int(at - 0.02) for at in taken)
        for second in range(1, 4):
            self.assertTrue(1.8 <= counts[second] / counts[second - 1] <= 2.1, counts)
        self.assertEqual((throttle.rate, throttle.window, throttle.congestions), (None, None, 0))

    def test_finds_the_rate_and_stays_near_it(self):
        """Taken / time between two limits is the rate; few requests are refused."""
        for rate, burst, most in ((0.05, 3, 0.25), (0.5, 5, 0.14), (5, 5, 0.05), (20, 20, 0.02)):
            with self.subTest(rate=rate):
                until = 120 + 150 / rate
                (throttle,), (taken,), (refused,) = simulate(Bucket(rate, burst), until)
                self.assertAlmostEqual(throttle.rate / rate, 1.0, delta=0.03)
                self.assertGreater(len(taken), 0.9 * rate * until)
                self.assertLess(len(refused), most * len(taken))

    def test_takes_any_status_of_overload_for_a_refusal(self):
        """nginx says 503, some providers 529: what follows tells what it means."""
        first, *others = (simulate(Bucket(5, 5), 60.0, status=status)[1:]
                          for status in (429, 503, 529, None))
        self.assertEqual(others, [first] * 3)

    def test_knows_chance_from_a_limit(self):
        """Some servers refuse a few whatever the rate: that is no limit, told or not."""
        for chance, retry_after, rate, least in (
                (0.05, None, 1e6, 0.85), (0.03, 20.0, 1e6, 0.7), (0.1, None, 1e6, 0.8),
                (0.03, None, 10, 0.85), (0.03, None, 20, 0.85)):
            with self.subTest(chance=chance, retry_after=retry_after, rate=rate):
                (throttle,), (taken,), (refused,) = simulate(
                    Bucket(rate, rate), 200.0, chance=chance, retry_after=retry_after)
                self.assertGreater(len(taken), least * 200 * min(rate, 48))
                self.assertLess(len(refused), (chance + 0.06) * len(taken))
                self.assertTrue(0.3 * chance * len(taken) < throttle.chance <= len(refused))

    def test_obeys_the_retry_after_of_a_limit(self):
        """Nothing leaves before the server's time; max_delay bounds it."""
        for asked, high in ((7.0, 15.0), (2.0, 10.0), (90.0, 30.0)):
            throttle = cometlimit.Throttle(random=lambda: 0.5)
            *_, (now, _) = self.drive(throttle, 8, lambda _: False, retry_after=asked)
            self.assertTrue(min(asked, 30.0) - 1e-6 <= throttle.wait(now) <= high, asked)

    def test_keeps_its_rate_through_outages_and_idle_hours(self):
        """Neither says anything about the limit. In an outage the pauses grow, to a bound."""
        throttle, limiter = cometlimit.Throttle(random=lambda: 0.5), Bucket(5, 5)
        *_, (now, _) = self.drive(throttle, 600, limiter.take)
        rate = throttle.rate
        *_, (now, _) = self.drive(throttle, 300, limiter.take, now + 7200)
        self.assertAlmostEqual(throttle.rate / rate, 1.0, delta=0.1)
        waits = [round(wait, 3) for _, wait in self.drive(throttle, 30, lambda _: False, now)]
        pauses = [wait for wait in waits if wait > 0.3]
        self.assertEqual(pauses, sorted(pauses))
        self.assertTrue(5 * pauses[0] < pauses[-1] <= 30.0, pauses)
        self.assertGreater(throttle.rate, 0.6 * rate)

    def test_ignores_stragglers(self):
        """Refusals of requests that left before the pause belong to the same congestion."""
        throttle = cometlimit.Throttle(random=lambda: 0.5)
        tickets = [throttle.sent(0.01 * number) for number in range(20)]
        while not throttle.congestions:
            throttle.refused(tickets.pop(0), 0.2, 429, None)
        known = throttle.until, throttle.rate, throttle.window, throttle.congestions
        for ticket in tickets:
            throttle.refused(ticket, throttle.until - 0.1, 429, 20.0)
        self.assertEqual(
            (throttle.until, throttle.rate, throttle.window, throttle.congestions), known)

    def test_finds_the_window_of_a_cap_on_concurrency(self):
        """Refused at the same number in flight again and again; Retry-After changes nothing."""
        for most, retry_after in itertools.product((1, 2, 8), (None, 2.0)):
            with self.subTest(most=most, retry_after=retry_after):
                (throttle,), (taken,), (refused,) = simulate(
                    Bucket(0, most), 200.0, retry_after=retry_after)
                self.assertEqual((throttle.window, throttle.rate), (most, None))
                self.assertGreater(len(taken), 0.75 * most * 200 / 1.04)
                self.assertLess(len(refused), 0.12 * len(taken))

    def test_lets_shares_even_out(self):
        """Clients that share a limit come to even shares, whoever came first."""
        _, taken, _ = simulate(Bucket(8, 8), 600.0, clients=2)
        shares = sorted(sum(at > 200.0 for at in times) for times in taken)
        self.assertGreater(shares[0], 0.6 * shares[1])
        self.assertGreater(sum(map(len, taken)), 0.93 * 8 * 600)

    def test_gives_sane_numbers_whatever_comes_back(self):
        """In whatever order: no wait is longer than max_delay, and no state grows."""
        dice, sizes = random.Random(3), set()
        throttle, now, flying, known = cometlimit.Throttle(20.0, dice.random), 0.0, [], 0
        for number in range(20000):
            now += dice.choice([0.0, 1e-9, 0.01, dice.expovariate(1.0), 3600.0])
            wait = throttle.wait(now)
            self.assertTrue(0.0 <= wait <= 20.0 or throttle.window and flying, wait)
            if wait == 0.0 and len(flying) < 99:
                flying.append(throttle.sent(now))
            elif flying:
                ticket = flying.pop(dice.randrange(len(flying)))
                if dice.random() < 0.5:
                    throttle.answered(ticket, now)
                else:
                    throttle.refused(ticket, now, dice.choice([429, 503, None]),
                                     dice.choice([None, 0.0, 0.1, 50.0, 1e9, math.inf]))
            self.assertGreaterEqual(throttle.congestions, known)
            self.assertTrue(throttle.rate is None or 0.0 < throttle.rate < 1e9)
            known = throttle.congestions
            sizes.add(sum(map(sys.getsizeof, vars(throttle).values())) // 1000)
        self.assertEqual(sizes, {min(sizes)})


def https(server):
    return server.url.replace("http:", "https:")


NOWHERE = "https://127.0.0.1:1/v1"
SCHEMES = (None, "127.0.0.1")  # as tls= of a Server


class Hostile(Case):
    """What the classes below share."""

    def outcome_at(self, client, prompt="Hi"):
        return next(client.map([prompt], return_exceptions=True))

    def addresses(self, *ports, seconds=0.0):
        """"localhost" has these ports of 127.0.0.1 for addresses; it takes a while to find them."""
        original, slow = socket.getaddrinfo, threading.Event()

        def look_up(host, *rest, **options):
            if host != "localhost":
                return original(host, *rest, **options)
            slow.wait(seconds)
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))
                    for port in ports]
        self.addCleanup(slow.set)
        self.replace(socket, getaddrinfo=look_up)

    @contextlib.contextmanager
    def dead(self):
        """A port that never answers: its queue is full."""
        with socket.socket() as listener, contextlib.ExitStack() as stack:
            listener.bind(("127.0.0.1", 0))
            listener.listen(0)
            for _ in range(4):
                sock = stack.enter_context(socket.socket())
                sock.setblocking(False)
                sock.connect_ex(listener.getsockname())
            time.sleep(0.02)
            yield listener.getsockname()[1]


class AHostileAnswer(Hostile):
    """Costs at most its attempt: no hang, no crash, no memory, no wrong text."""

    def test_ends_at_the_timeout(self):
        """Whatever drips or floods, in whichever part, over http and https."""
        self.real_time()
        early, header = b"HTTP/1.1 100 Continue\r\n\r\n", b"X: y\r\n"
        lines = [flood(start, piece, 0.02) for start, piece in (
            (b"HTTP/1.1 200 ", b"O"), (HEAD + b"X: ", b"y"), (HEAD + CHUNKED, b"1\r\n \r\n"),
            (HEAD + b"Content-Length: 1000000\r\n\r\n", b" "))] + [
            flood(b"", early, 0.02), flood(b"", early), flood(HEAD + CHUNKED + b"0\r\n", header),
            flood(HEAD + CHUNKED + b"0\r\n", header, 0.02), flood(HEAD, header, 0.02),
            flood(HEAD.replace(b"200 OK", b"503 No") + b"\r\n", b" ", 0.02)]
        for tls in SCHEMES:
            with Server(*lines, tls=tls) as server, self.client(
                    server, timeout=0.2, max_retries=0, max_concurrency=len(lines)) as client:
                for error in client.map(["Hi"] * len(lines), return_exceptions=True):
                    with self.subTest(tls=tls):
                        self.assertTrue(error.status_code == 503 or
                                        type(error) is cometlimit.APITimeoutError, repr(error))
                        self.assertTrue(error.retryable)
                        self.assertLess(error.records[0].latency, 2.0)

    def test_is_no_answer_wherever_it_is_cut_off(self):
        """The end of the connection after any byte is a failure that may pass."""
        bodies = (HEAD + FRAMED, HEAD + CHUNKED + b"10\r\n%s\r\n%x\r\n%s\r\n0\r\n\r\n" % (
            GOOD[:16], len(GOOD) - 16, GOOD[16:]))
        for whole, (tls, step) in itertools.product(bodies, zip(SCHEMES, (1, 9))):
            cuts = [whole[:size] for size in range(0, len(whole), step)]
            with Server(*map(raw, cuts), tls=tls) as server:
                with self.client(server, max_retries=0) as client:
                    for cut in cuts:
                        done = self.outcome_at(client)
                        with self.subTest(tls=tls, cut=cut[-20:]):
                            if GOOD[-9:] in cut:  # only the framing's end is missing
                                self.assertEqual(getattr(done, "text", "all"), "all")
                            else:
                                self.assertIn(type(done), (cometlimit.APIConnectionError,
                                                           cometlimit.APIResponseError))
                                self.assertTrue(done.retryable, done)
            self.assertEqual(len(server.requests), len(cuts))

    def test_takes_no_more_memory_than_is_allowed(self):
        """A body too long is left unread, however it is framed; an error's sooner."""
        self.real_time()
        for (code, most), frame in itertools.product(
                ((400, cometlimit._MAX_ANSWER), (200, 1 << 18)),
                (b"\r\n", b"Content-Length: 10000000000\r\n\r\n", CHUNKED + b"fffffffffffff\r\n",
                 CHUNKED + b"-70000\r\n", CHUNKED + b"-1\r\n")):
            self.replace(cometlimit, _MAX_ANSWER=most)
            line = flood(b"HTTP/1.1 %d Any\r\n%s" % (code, frame), b" " * (1 << 16))
            with Server(line) as server, self.client(server, max_retries=0, timeout=5.0) as client:
                tracemalloc.start()
                error = self.outcome_at(client)
                peak = tracemalloc.get_traced_memory()[1]
                tracemalloc.stop()
            with self.subTest(code=code, frame=frame):
                self.assertLess(peak, 16 << 20)
                if code == 200:  # it ends by what it is, not only by the timeout
                    self.assertNotIsInstance(error, cometlimit.APITimeoutError)
                if b"\n-" not in frame:
                    self.assertEqual((error.status_code, error.retryable), (code, False))

    def test_is_not_taken_for_another(self):
        """Odd heads end as a named Error or are understood; the next answer is the next's own."""
        named, response = cometlimit.APIConnectionError, cometlimit.APIResponseError
        for data, expected in (
                (b"SSH-2.0-OpenSSH_9.2\r\n", named), (b"\x00" * 300, named), (b"\r\n\r\n", named),
                (b"HTTP/1.1 abc OK\r\n" + FRAMED, named), (b"HTTP/1.1 1000 OK\r\n" + FRAMED, named),
                (b"HTTP/2 200\r\n" + FRAMED, named), (b"HTTP/1.1 200 " + b"x" * 70000, named),
                (HEAD + b"X: y\r\n" * 101 + FRAMED, named), (HEAD + b"X: " + b"y" * 70000, named),
                (HEAD + b"Content-Length: 10000000000\r\n\r\n[]", named),
                (HEAD + b"Content-Length: 5\r\n" + FRAMED, response),
                (HEAD + b"X : 1\r\n" + FRAMED, "all"), (HEAD + b"no colon\r\n" + FRAMED, "all"),
                (HEAD + b"Content-Length: -5\r\n\r\n" + GOOD, "all"),
                (HEAD + b"Content-Length: x\r\n\r\n" + GOOD, "all"),
                (HEAD + b"\r\n" + GOOD, "all"), (b"HTTP/1.1 200\r\n" + FRAMED, "all"),
                (b"HTTP/1.1 100 Go\r\n\r\n" * 3 + HEAD + FRAMED, "all"),
                (b"HTTP/1.1 103 Early\r\nLink: x\r\n\r\n" + HEAD + FRAMED, response),
                (b"HTTP/1.1 999 Any\r\n" + FRAMED, cometlimit.APIStatusError),
                (b"HTTP/1.1 204 No\r\n\r\n", response)):
            with self.subTest(data=data[:60]), Server(raw(data), reply("next")) as server:
                with self.client(server, max_retries=0) as client:
                    done = self.outcome_at(client)
                    self.assertEqual(getattr(done, "text", type(done)), expected)
                    if expected is named:
                        self.assertTrue(done.retryable)
                        self.assertIn(" 127.0.0.1:%d" % server.port, str(done))
                    self.assertEqual(client.ask("Hi"), "next")

    def test_does_not_overrun_a_small_stack(self):
        """Deep JSON, as an answer or an error, where threads have 1 MiB of stack."""
        deep = [status(code, text * 200000) for code in (200, 400) for text in ("[", '{"a":')]
        self.addCleanup(threading.stack_size, threading.stack_size(1 << 20))
        with Server(*deep) as server, self.client(server, max_retries=0) as client:
            for error in client.map(["Hi"] * 4, return_exceptions=True):
                self.assertIsInstance(error, cometlimit.Error)

    def test_in_a_stream_ends_with_its_last_event(self):
        """A body that goes on after [DONE] is left after a moment."""
        event = b'data: {"choices": [{"delta": {"content": "%s"}, "finish_reason": %s}]}\n\n'
        whole = event % (b"all", b'"stop"') + b"data: [DONE]\n\n"
        start = HEAD + b"Content-Type: text/event-stream\r\n"

        def chunk(data):
            return b"%x\r\n%s\r\n" % (len(data), data)
        self.real_time()
        self.replace(cometlimit, _AFTER_DONE=0.1)
        def stream(tls, framed):
            with Server(flood(start + framed[0], framed[1], 0.02), tls=tls) as server:
                client = self.client(server, stream=True, timeout=5.0, max_retries=0)
                with self.within(4.0):
                    self.assertEqual(client.ask("Hi"), "all")
        self.beside(stream, itertools.product(SCHEMES, (
            (b"\r\n" + whole, b": ping\n\n"), (CHUNKED + chunk(whole), b""),
            (CHUNKED + chunk(whole), chunk(b": ping\n\n")))))


class AConnectionKept(Hostile):
    """Never gives a request another one's answer, and never sends it twice without need."""

    def test_drops_what_is_out_of_step(self):
        """Stray bytes behind a body, an interim answer, a late one: none is served as the next."""
        wrong = HEAD + FRAMED.replace(b"all", b"BAD")
        head = HEAD + b"Content-Length: %d\r\nX: " % len(GOOD)
        aligned = head + b"y" * (8192 - len(head) - 4 - len(GOOD)) + b"\r\n\r\n" + GOOD
        early = b"HTTP/1.1 103 Early\r\n\r\n"
        def check(tls, part):
            start, then, later = part
            late, sent = threading.Event(), threading.Event()

            def send(sock):
                try:
                    sock.sendall(start + then)
                    late.wait(0.02 if start else TIMEOUT)
                    sock.sendall(later)
                finally:
                    sent.set()
            with Server(Line(send, keep=True), reply("next"), tls=tls) as server:
                with self.client(server, max_retries=0, timeout=30.0 if start else 0.5) as client:
                    first = self.outcome_at(client)
                    late.set()
                    self.assertTrue(sent.wait(TIMEOUT))
                    time.sleep(0.01)
                    self.assertEqual(getattr(first, "text", None),
                                     "all" if start[-9:] == GOOD[-9:] else None)
                    self.assertEqual((client.ask("Hi"), server.connections), ("next", 2))
        self.beside(check, itertools.product(SCHEMES, (
            (b"", b"", wrong), (aligned, wrong, b""), (aligned, b"", wrong), (aligned, b" ", b""),
            (aligned.replace(b"y" * 100, b""), wrong, b""),
            (early, b"", b""), (early, b"", wrong))))

    def test_that_the_server_closed_costs_nothing(self):
        """A server that closes after each answer sees each request exactly once."""
        texts = [str(number) for number in range(12)]
        for tls in SCHEMES:
            with Server(*[Line(reply(text).send) for text in texts], tls=tls) as server:
                with self.client(server, max_retries=0) as client:
                    for text in texts:
                        self.assertEqual(client.ask(text), text)
                        time.sleep(0.005 * (int(text) % 2))
            self.assertEqual([request.prompt for request in server.requests], texts)

    def test_that_dies_is_replaced_once(self):
        """Its request is sent again, the same attempt, with a Record: both may be charged."""
        partly = Line(lambda sock: (sock.sendall(HEAD), time.sleep(0.02), RESET.send(sock)))
        for tls, (script, prompts, statuses) in itertools.product(SCHEMES, (
                ((reply("a"), HANG_UP, reply("b")), "122", [200, None, 200]),
                ((reply("a"), RESET, reply("b")), "122", [200, None, 200]),
                ((reply("a"), HANG_UP, RESET), "122", [200, None, None]), ((RESET,), "1", [None]),
                ((reply("a"), partly), "12", None))):
            records = []
            with self.subTest(tls=tls, statuses=statuses), Server(*script, tls=tls) as server:
                with self.client(server, max_retries=0, on_record=records.append) as client:
                    done = [self.outcome_at(client, prompt) for prompt in sorted(set(prompts))]
                self.assertEqual("".join(one.prompt for one in server.requests), prompts)
                if statuses is None:  # by chance half a head, or a reset
                    self.assertIsInstance(done[-1], cometlimit.Error)
                    continue
                self.assertEqual([(record.status, record.attempt, record.error)
                                  for record in records], [
                    (code, 1, None if code else "connection_error") for code in statuses])
                self.assertEqual((type(done[-1]), done[-1].attempts), (
                    cometlimit.Completion if statuses[-1] else cometlimit.APIConnectionError, 1))
                if not statuses[-1]:
                    self.assertEqual(done[-1].records, tuple(records[len(done) - 1:]))

    def test_is_not_replaced_when_nobody_waits(self):
        """A client that is closed meanwhile asks for no name and sends nothing again."""
        self.real_time()
        with Server(reply("a"), HANG_UP) as server:
            self.addresses(server.port)
            client = self.client("http://localhost:%d/v1" % server.port,
                                 on_record=lambda record: record.status or client.close())
            client.ask("1")
            self.addresses(server.port, seconds=6.0)
            with self.within(4.0):
                self.assert_error(client.submit("2").exception(TIMEOUT), cometlimit.Error, GONE)

    def test_brings_an_early_refusal(self):
        """A 413 while the request is still going out is seen, not taken for a broken pipe."""
        def refuse(sock):
            sock.recv(1 << 16)
            status(413, {"error": {"message": "too big"}}, {"Connection": "close"}).send(sock)
            sock.settimeout(0.2)
            with contextlib.suppress(OSError):
                while waits and sock.recv(1 << 16):
                    pass
        for tls, waits in ((None, False), (None, True), ("127.0.0.1", True)):
            with self.subTest(tls=tls, waits=waits), Server(job=refuse, tls=tls) as server:
                error = self.outcome_at(self.client(server), "x" * 12000000)
                self.assertEqual((error.status_code, server.connections), (413, 1), error)

    def test_is_kept_alive_whatever_its_number(self):
        """TCP keep-alive, so that no firewall forgets it; a descriptor of 1024 is no hindrance."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if hard != resource.RLIM_INFINITY and hard < 1200 or not hasattr(select, "poll"):
            self.skipTest("no 1200 descriptors are allowed here")
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1200), hard))
        self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        with Server(reply("a"), reply("b")) as server, contextlib.ExitStack() as stack:
            for _ in range(1030):
                stack.callback(os.close, os.dup(server.listener.fileno()))
            with self.client(server, max_retries=0) as client:
                self.assertEqual([client.ask("Hi"), client.ask("Hi")], ["a", "b"])
                (kept,) = client._pool.connections.kept
                self.assertGreaterEqual(kept.sock.fileno(), 1024)
                self.assertTrue(kept.sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))
                self.assertTrue(kept.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
                idle = getattr(socket, "TCP_KEEPIDLE", socket.TCP_NODELAY)
                self.assertIn(kept.sock.getsockopt(socket.IPPROTO_TCP, idle), (1, 30))
            self.assertEqual(server.connections, 1)

    def test_is_one_for_each_in_flight(self):
        """500 prompts, 50 wide: 50 connections and 100 threads at most, and none is left."""
        self.real_time()
        before = len(os.listdir("/proc/self/fd")), threading.active_count()
        texts = list(map(str, range(500)))
        with Server(forever=reply_echo) as server:
            with self.client(server, max_concurrency=50) as client:
                calls = list(map(client.submit, texts))
                self.assertEqual([call.result(TIMEOUT).text for call in calls], texts)
                own = [t for t in threading.enumerate() if t.name.startswith("cometlimit")]
                self.assertLessEqual(len(own), 100)
            self.assertLessEqual(server.connections, 50)
        self.threads_end()
        gc.collect()
        self.assertLessEqual((len(os.listdir("/proc/self/fd")), threading.active_count()), before)


class TheClock(Hostile):
    """Bounds what comes before the answer, too."""

    def setUp(self):
        super().setUp()
        self.real_time()

    def test_bounds_name_and_connection(self):
        """All addresses together; a living one behind dead ones is reached."""
        with self.dead() as port, Server(reply("a"), reply("b")) as server:
            for ports, seconds, timeout, bound in (
                    ([port] * 4, 0.0, 0.1, 15.0), ([port] * 4, 0.0, 600.0, 0.1),
                    ([port], 6.0, 600.0, 0.1), ([port], 6.0, 0.1, 15.0)):
                self.addresses(*ports, seconds=seconds)
                self.replace(cometlimit, _CONNECT=bound)
                with self.subTest(seconds=seconds, timeout=timeout), self.within(5.0, least=0.08):
                    error = self.outcome_at(self.client(
                        "http://localhost:7/v1", timeout=timeout, max_retries=0))
                    self.assert_error(error, cometlimit.APITimeoutError,
                                      "no connection to localhost:7 in time",
                                      code="connect_timeout", retryable=True)
            self.replace(cometlimit, _CONNECT=1.0)
            for ports, seconds in (([server.port], 0.1), ([port, server.port] + [port] * 5, 0.0)):
                self.addresses(*ports, seconds=seconds)
                with self.within(0.9):  # each has its share
                    self.client("http://localhost:7/v1", max_retries=0).ask("Hi")

    def test_bounds_a_handshake(self):
        """A server or proxy that says nothing, or drips, while the connection is made."""
        def silent(sock):
            flood(sock.recv(1 << 16)[:0], piece, 0.02).send(sock)
        pieces = b"", b"H", b"HTTP/1.1 100 Go\r\n\r\n"
        for piece, kind in itertools.product(pieces, ("", "proxy")):
            with self.subTest(piece=piece, kind=kind), Server(job=silent) as server:
                os.environ["https_proxy"] = kind and "127.0.0.1:%d" % server.port
                with self.within(5.0):
                    client = self.client(https(server), timeout=0.1, max_retries=0)
                    error = self.outcome_at(client)
                self.assertIsInstance(error, cometlimit.APIConnectionError)
                self.assertIn("%s 127.0.0.1:%d" % (kind, server.port), str(error))

    def test_bounds_an_upload(self):
        """A server that never reads ends at the timeout; the text says which and what to do."""
        def check(tls):
            gate = threading.Event()
            with Server(job=lambda sock: gate.wait(6.0), tls=tls) as server, self.within(5.0):
                client = self.client(server, timeout=0.3, max_retries=0)
                error = self.outcome_at(client, "x" * 8000000)
                gate.set()
                self.assert_error(
                    error, cometlimit.APITimeoutError, "no answer from 127.0.0.1:%d within 0.3 s: "
                    "raise timeout= (or deadline=) if the model needs longer" % server.port)
        self.beside(check, zip(SCHEMES))

    def test_is_not_needed_by_close(self):
        """A name, a connection, a handshake, an upload, an answer: hung up on at once."""
        def silent(sock):
            if place != "upload":
                sock.recv(1 << 16)
            met.set()
            with contextlib.suppress(OSError):
                left.wait(6.0) if place == "upload" else sock.recv(1 << 16)
            gone.set()
        for place, tls in (("name", None), ("name", "s"), ("connect", None), ("connect", "s"),
                           ("handshake", "s"), ("proxy", "s"), ("upload", None), ("upload", "s"),
                           ("answer", None), ("answer", "s")):
            met, gone, left = threading.Event(), threading.Event(), threading.Event()
            with self.subTest(place=place, tls=tls), self.dead() as port, Server(
                    job=silent, tls=tls and place[:2] in ("up", "an") and "127.0.0.1") as server:
                url = https(server) if tls else server.url
                os.environ["https_proxy"] = "127.0.0.1:%d" % server.port if place == "proxy" else ""
                if place in ("name", "connect"):
                    self.addresses(port, seconds=6.0 if place == "name" else 0.0)
                    url = url.replace("127.0.0.1", "localhost")
                    met.set(), gone.set()
                client = self.client(url, timeout=6.0)
                call = client.submit("x" * (8000000 if place == "upload" else 1))
                self.assertTrue(met.wait(TIMEOUT))
                time.sleep(0.03)
                with self.within(4.0):
                    client.close()
                    self.assert_error(call.exception(TIMEOUT), cometlimit.Error, GONE)
                left.set()
                self.assertTrue(gone.wait(1.0), "not hung up on")
                self.threads_end()


class TheProxy(Hostile):
    """Is the environment's."""

    def use(self, scheme, proxy, user=""):
        os.environ[scheme + "_proxy"] = "http://%s127.0.0.1:%d" % (user, proxy.port)

    def test_gets_its_password_and_nothing_else(self):
        """Nor does the server the password; what a proxy slips in is not read as the server's."""
        for user, line in (("me:p%40ss@", "Basic bWU6cEBzcw=="), ("me@", "Basic bWU6"), ("", None),
                           ("me:\udcff@", "Basic bWU6/w=="), ("u:p%ff@", "Basic dTpw/w==")):
            with self.subTest(user=user), Proxy(slip=HEAD + FRAMED) as proxy:
                with Server(reply("a"), reply("b"), tls="127.0.0.1") as server:
                    self.use("https", proxy, user)
                    with self.client(server) as client:
                        self.assertEqual([client.ask("Hi"), client.ask("Hi")], ["a", "b"])
                (head,), name = proxy.heads, "127.0.0.1:%d" % server.port
                self.assertTrue(head.startswith(
                    "CONNECT %s HTTP/1.1\r\nHost: %s\r\n" % (name, name)), head)
                self.assertEqual("Proxy-Authorization: %s\r\n" % line in head, line is not None)
                self.assertNotIn(KEY, head)
                for request in server.requests:
                    self.assertNotIn("proxy-authorization", request.headers)
                    self.assertEqual(request.headers["authorization"], "Bearer " + KEY)
            with self.subTest(user=user, scheme="http"), Server(reply("a")) as proxy:
                self.use("http", proxy, user)  # which is asked for the whole URL
                client = self.client("http://far.example:81/v1?a=b", allow_http=True)
                self.assertEqual(client.ask("Hi"), "a")
                (seen,) = proxy.requests
                self.assertEqual(
                    (seen.path, seen.headers["host"], seen.headers.get("proxy-authorization")),
                    ("http://far.example:81/v1/chat/completions?a=b", "far.example:81", line))

    def test_is_left_out_where_it_is_not_wanted(self):
        """NO_PROXY has its usual forms; what the environment says after the client was made does
        not matter; lower case wins; an http proxy elsewhere never sees what is for here."""
        for no, direct in (("", 0), ("127.0.0.1", 1), ("*", 1), ("x, 127.0.0.1 ", 1), (".0.0.1", 1),
                           ("127.0.0.1:%d", 1), ("127.0.0.1:1", 0), ("127.0.0.0/8", 0), ("x", 0)):
            with self.subTest(no=no), Proxy() as proxy, Server(*[reply("yes")] * 4) as server:
                os.environ.update(no_proxy=no.replace("%d", str(server.port)), http_proxy="")
                before = self.client(server)
                self.use("http", proxy)
                self.assertEqual(self.client(server).ask("Hi"), "yes")
                os.environ.update(HTTP_PROXY=os.environ["http_proxy"], http_proxy="")
                clients = [before, self.client(server)]
                os.environ["http_proxy"] = "http://192.0.2.1:3128"
                for client in clients + [self.client(server)]:
                    self.assertEqual(client.ask("Hi"), "yes")
                self.assertEqual(["POST http://" in head for head in proxy.heads],
                                 [True] * (1 - direct))

    def test_that_refuses_is_believed(self):
        """407, 403 and redirects are for good; 502, 503 and 504 may pass; garbage may, too."""
        login, told = " (login for the proxy: http://user:password@host:port in https_proxy)", []
        self.throttle(refused=lambda own, *rest: told.append(rest[2]))
        for code, attempts, hint in ((407, 1, login), (403, 1, ""), (302, 1, ""), (502, 3, ""),
                                     (503, 3, ""), (504, 3, "")):
            with self.subTest(code=code), Proxy(refuse=code) as proxy:
                self.use("https", proxy, "me:secret@")
                error = self.outcome_at(self.client(NOWHERE, max_retries=2))
                self.assert_error(
                    error, cometlimit.APIConnectionError, "the proxy 127.0.0.1:%d refuses: %d Any%s"
                    % (proxy.port, code, hint), attempts=attempts, retryable=attempts > 1)
                self.assertEqual(len(proxy.heads), attempts)
        self.assertEqual(told, [503] * 9)  # what may pass says something about load
        for data in (b"nonsense\r\n\r\n", b"", b"HTTP/1.1 200 OK\r\n\r\nnonsense, not TLS"):
            def answer(sock):
                sock.recv(1 << 16)
                sock.sendall(data)
            with self.subTest(data=data), Server(job=answer) as proxy:
                self.use("https", proxy, "me:secret@")
                error = self.outcome_at(self.client(NOWHERE, max_retries=1))
                self.assertIs(type(error), cometlimit.APIConnectionError)
                self.assertIn("the proxy 127.0.0.1:%d" % proxy.port, str(error))
                self.assertNotIn("secret", str(error))

    def test_for_all_schemes_is_told_to_be_unused(self):
        """all_proxy goes by in silence, unless no connection comes about without it."""
        hint = " (all_proxy is not used: name the proxy in https_proxy)"
        for names, told in (("", False), ("all_proxy", hint), ("ALL_PROXY", hint),
                            ("all_proxy https_proxy", False)):
            os.environ.update(dict.fromkeys(names.split(), "http://127.0.0.1:1"))
            error = str(self.outcome_at(self.client(NOWHERE, max_retries=0)))
            with self.subTest(names=names):
                self.assertTrue(error.startswith("no connection to %s127.0.0.1:1. Conn" % (
                    "the proxy " * ("https_proxy" in names))), error)
                self.assertEqual("all_proxy" in error and error[error.index(" (all"):], told)
            for name in names.split():
                del os.environ[name]

    def test_of_another_kind_is_refused(self):
        """A scheme that is not spoken is a ConfigurationError that shows no password."""
        for proxy in ("socks5://me:secret@h:1", "https://me:secret@h:1", "http://me:secret@",
                      "http://me:secret@h:x", "http://me:secret@h:70000", "me:secret@[::1"):
            os.environ["https_proxy"] = proxy
            with self.subTest(proxy=proxy):
                try:
                    cometlimit.Client(api_key=KEY)
                except cometlimit.ConfigurationError:
                    shown = traceback.format_exc()
                self.assertIn("https_proxy cannot be used: only http://host:port can", shown)
                self.assertNotIn("secret", shown)


class TrustedCertificates(Hostile):
    """No other server gets the key."""

    def handshake(self, context, **options):
        """The error of a client, what it has sent, and the number of its connections."""
        def serve(sock):
            with context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False) as tls:
                try:
                    tls.do_handshake()
                    seen.append(tls.recv(1 << 16))
                except OSError:
                    while socket.socket.recv(tls, 1 << 16):  # left unread, it would be a reset
                        pass
        seen, prompt = [], options.pop("prompt", "Hi")
        with Server(job=serve) as server:
            error = self.outcome_at(self.client(https(server), **options), prompt)
        self.assertIs(type(error), cometlimit.APIConnectionError)
        self.assertEqual((error.attempts, error.retryable), (1, False), error)
        self.assertEqual((server.connections, [data for data in seen if data]), (1, []))
        return str(error)

    def test_are_those_of_a_known_authority_for_this_host_and_time(self):
        """An unknown CA, another host, a past date: told with the remedy, once; whatever the
        program did to ssl's defaults. So is, where Python is strict, a CA without key usage."""
        self.replace(ssl, _create_default_https_context=ssl._create_unverified_context)
        good, lax = certificate("127.0.0.1"), certificate("ca", usage="")
        table = [(certificate("localhost"), {}), (good, {"ca_file": None}),
                 (certificate("127.0.0.1", days="0"), {}),
                 (certificate("127.0.0.1", signed=False), {}),
                 (good, {"ca_file": certificate("localhost")})]
        if ssl.create_default_context().verify_flags & getattr(ssl, "VERIFY_X509_STRICT", 0):
            table.append((good, {"ca_file": lax}))
        else:
            with Server(reply("yes"), tls="127.0.0.1") as server:
                self.assertEqual(self.client(server, ca_file=lax).ask("Hi"), "yes")
        for file, options in table:
            with self.subTest(file=file, **options):
                self.assertRegex(
                    self.handshake(server_context(file), **options), "not trusted.*ca_file=, "
                    "SSL_CERT_FILE or REQUESTS_CA_BUNDLE.*3.13 also demands a CA.*key usage")
        os.environ["SSL_CERT_FILE"] = "/no/file"
        self.assertIn("not trusted", self.handshake(server_context(good), ca_file=None))

    def test_may_be_named_in_many_ways(self):
        """By ca_file, a bundle of the environment or a directory of hashed names; ca_file wins,
        beside the system's. What is missing or empty is named, with where it was said."""
        authority, none = certificate("ca"), "/no/file"
        folder, empty = os.path.join(Made.certificates, "hashed"), Made.certificates + "/empty"
        name = openssl("x509", "-hash", "-noout", "-in", authority).strip()
        os.makedirs(folder, exist_ok=True)
        shutil.copy(authority, os.path.join(folder, name + ".0"))
        open(empty, "w").close()
        for variables, option in (
                ({"CURL_CA_BUNDLE": authority}, None), ({"REQUESTS_CA_BUNDLE": folder}, None),
                ({}, folder), ({"SSL_CERT_DIR": folder}, None),
                ({"REQUESTS_CA_BUNDLE": none}, authority),
                ({"SSL_CERT_FILE": authority}, certificate("localhost")),
                ({"REQUESTS_CA_BUNDLE": authority, "CURL_CA_BUNDLE": none}, None)):
            with self.subTest(option=option, **variables):
                with unittest.mock.patch.dict(os.environ, variables), Server(
                        reply("yes"), tls="127.0.0.1") as server:
                    self.assertEqual(self.client(server, ca_file=option).ask("Hi"), "yes")
        bad = [(name, path) for path in (none, empty) for name in (
            "ca_file", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")]
        if sys.version_info >= (3, 8) and not sys.flags.ignore_environment:
            bad.append(("SSLKEYLOGFILE", none))
        for name, path in bad:
            with self.subTest(name=name, path=path), unittest.mock.patch.dict(
                    os.environ, {} if name == "ca_file" else {name: path}):
                words = "%s" if name == "SSLKEYLOGFILE" else "of " + name + " .*%s"
                with self.assertRaisesRegex(cometlimit.ConfigurationError, words % path):
                    cometlimit.Client(api_key=KEY, ca_file=path if name == "ca_file" else None)

    def test_do_not_help_an_old_protocol_and_may_be_demanded_of_the_client(self):
        """TLS 1.1 is refused even where OpenSSL would allow it; a client's certificate is told to
        be demanded once, in the handshake or, with TLS 1.3, in the place of an answer."""
        def lax(context):
            context.set_ciphers("ALL:@SECLEVEL=0")
            if hasattr(ssl, "TLSVersion"):
                context.minimum_version = ssl.TLSVersion.TLSv1
            return context
        original, no = ssl.create_default_context, (getattr(ssl, "OP_NO_TLSv1_3", 0),
                                                    ssl.OP_NO_TLSv1_2)
        for forbidden, strict, size, words in (
                (sum(no), False, 1, "no TLS with 127.0.0.1:"),
                (no[0], True, 1, "may demand a cert"), (no[0], True, 3000000, "may demand a cert"),
                (no[1], True, 1, "may demand a cert"), (no[1], True, 3000000, "may demand a cert")):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the newest deprecate what is needed here
                context = server_context(certificate("127.0.0.1"))
                if strict:
                    context.verify_mode = ssl.CERT_REQUIRED
                else:
                    self.replace(ssl, create_default_context=lambda: lax(original()))
                    lax(context)
                context.options |= forbidden
                with self.subTest(forbidden=forbidden, size=size):
                    self.assertIn(words, self.handshake(context, prompt="x" * size))

    def test_of_a_server_that_goes_away_may_come_later(self):
        """A hang-up or a reset during the handshake may pass; a server without TLS does not."""
        for line, attempts in ((HANG_UP, 2), (RESET, 2), (raw(b"HTTP/1.1 400 No\r\n\r\n"), 1)):
            with self.subTest(attempts=attempts), Server(
                    job=lambda sock: sock.recv(1 << 16) and line.send(sock)) as server:
                error = self.outcome_at(self.client(https(server), max_retries=1))
                self.assertIs(type(error), cometlimit.APIConnectionError)
                self.assertEqual((error.attempts, server.connections), (attempts, attempts), error)


class LockedDownPlaces(Hostile):
    """Are where this runs."""

    def test_do_not_matter(self):
        """Flags, environment, closed streams, no folder, no file to write. Few descriptors: those
        threads that get none leave the work to the others. None: told with its remedies, not taken
        for a name unknown or a server's fault."""
        hold = """
                resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))
                held = []
                try:
                    while True: held.append(os.dup(2))
                except OSError: pass"""
        table = {
            "isolated, no environment, no streams": {
                "flags": ["-I", "-S", "-B"], "env": {}, "shell": 'exec "$@" <&- >&- 2>&-'},
            "C": {"env": {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}},
            "64 descriptors, nothing to be written, no home": {
                "shell": 'unset HOME; ulimit -n 64; ulimit -f 0; exec "$@"'},
            "no folder": {"flags": ["-I"], "before": "import tempfile\n"
                          "place = tempfile.mkdtemp()\nos.chdir(place); os.rmdir(place)"},
            "no docstrings": {"flags": ["-OO"], "body": ASK + """
                assert cometlimit.main(["--help"]) == cometlimit.main(["--version"]) == 0"""},
            "no ssl": {"before": "sys.modules['_ssl'] = None", "body": ASK + """
                try: cometlimit.Client(api_key="k", model="m")
                except cometlimit.ConfigurationError as e: assert "ssl module" in str(e), e
                else: sys.exit("accepted")"""},
            "no descriptor": {"before": "import resource", "body": """
                client = cometlimit.Client(base_url=client.base_url.replace("127.0.0.1",
                                           "localhost"), model="m", max_retries=0)""" + hold + """
                error = next(client.map(["Hi"], return_exceptions=True))
                if error.code != "no_socket" or "ulimit -n" not in str(error):
                    sys.exit(repr(error))
                for fd in held: os.close(fd)"""},
            "few descriptors": {
                "before": "import resource", "options": "max_concurrency=12, max_delay=0.1",
                "body": hold + """
                for fd in held[:4]: os.close(fd)
                prompts = list(map(str, range(24)))
                texts = [done.text for done in client.map(prompts)]
                if texts != prompts: sys.exit(repr(texts))
                for fd in held[4:]: os.close(fd)"""}}
        if hasattr(os, "geteuid") and os.geteuid() == 0:  # who may not even read the library
            table["no such user"] = {"before": "import pwd", "env": {}, "body": """
                sys.path[:] = []
                os.setgid(54321), os.setuid(54321)
                try: pwd.getpwuid(54321), sys.exit('known')
                except KeyError: pass
""" + ASK}
        with Server(forever=reply_echo) as server:
            started = [(name, start(server, **words)) for name, words in table.items()]
            for name, process in started:
                with self.subTest(name=name):
                    self.assertEqual(end(process), (0, ""))


class Threads(Hostile):
    """May be few, and may call from anywhere."""

    def test_that_cannot_be_started_are_an_error(self):
        """Without any, it is raised at once; with one, all is answered by that, names included."""
        original, left = threading.Thread.start, []

        def refuse(thread):
            if "cometlimit" in thread.name + threading.current_thread().name:
                if not left:
                    raise RuntimeError("can't start new thread")
                left.pop()
            original(thread)
        self.replace(threading.Thread, start=refuse)
        texts = list("abcdefgh")
        with Server(forever=reply_echo) as server:
            for allowed in (1, 0):
                left[:] = [None] * allowed
                with self.client(server, max_concurrency=4) as client:
                    for job in (lambda: list(client.map(texts)), lambda: client.ask("Hi")):
                        if allowed:
                            self.assertEqual([done.text for done in client.map(texts)], texts)
                        else:
                            with self.assertRaisesRegex(cometlimit.Error, "no thread can be start"):
                                job()
                    left[:] = [None] * 9
                    self.assertEqual(client.ask("again"), "again")

    def test_of_a_callback_do_not_wait_for_themselves(self):
        """ask(), map() and close() in a callback or in on_record: done or refused, no deadlock."""
        self.replace(cometlimit, _CLOSING=6.0)
        for name, place in itertools.product(("ask", "map", "close"), ("callback", "on_record")):
            told, ended, added = [], threading.Event(), threading.Event()

            def again(_):
                if not told:
                    told.append("began")
                    try:
                        list(getattr(client, name)(*["2"] * (name != "close")) or ())
                    except cometlimit.ConfigurationError as error:
                        told.append(str(error))
                    ended.set()
            with self.subTest(name=name, place=place), Server(forever=lambda request: added.wait(
                    TIMEOUT) and reply_echo(request)) as server:
                client = self.client(server, on_record=again if place == "on_record" else None)
                call = client.submit("1")
                if place == "callback":
                    call.add_done_callback(again)
                added.set()
                self.assertTrue(ended.wait(4.0), "a deadlock")
                self.assertEqual(call.result(TIMEOUT).text, "1")
                client.close()
                self.assertEqual(told[1:], [
                    "a callback would wait for itself: use submit()"] * (name != "close"))

    def test_at_the_end_of_the_interpreter_do_no_harm(self):
        """What was submitted is sent, within its timeout; in atexit: an answer or an Error."""
        late = """
                import atexit
                def last():
                    try: assert client.ask("late") == "late"
                    except cometlimit.Error: pass
                atexit.register(last)"""
        left = """
                for number in range(9): client.submit(str(number))
                client.submit("stall")"""
        with Server(forever=lambda request: stall() if request.prompt == "stall"
                    else reply_echo(request)) as server:
            for process in [start(server, body=late), start(
                    server, body=left, options="max_concurrency=2, timeout=0.3, max_retries=0")]:
                self.assertEqual(end(process), (0, ""))
            self.assertEqual({request.prompt for request in server.requests} - {"late"},
                             set("012345678") | {"stall"})

    @unittest.skipUnless(hasattr(os, "fork"), "there is no fork here")
    def test_of_a_fork_end_with_it(self):
        """A child that leaves its parent's with block, or submits at once, is not held."""
        authority, quiet = certificate("ca"), "import warnings; warnings.simplefilter('ignore')"
        with Server(forever=reply_echo, tls="127.0.0.1") as server:
            self.assertEqual(end(start(server, quiet, """
                assert client.ask("a") == "a"
                with client:
                    held = client.submit("b")
                    child = os.fork()
                    if not child:
                        assert client.submit("c").result().text == "c"
                if child:
                    assert held.result().text == "b"
                    assert os.waitpid(child, 0)[1] == 0""", "ca_file=%r" % authority)), (0, ""))
            self.assertEqual(sorted(request.prompt for request in server.requests), list("abc"))

    def test_of_two_clients_share_nothing(self):
        """Each has its own key, connection and limit."""
        with Server(forever=reply_echo) as one, Server(forever=reply_echo) as two:
            first, second = self.client(one), self.client(two, api_key="sk-other")
            for call in [client.submit("Hi") for client in (first, second) * 9]:
                self.assertEqual(call.result(TIMEOUT).text, "Hi")
            first.close()
            self.assertEqual(second.ask("on"), "on")
            for server, key, count in ((one, KEY, 9), (two, "sk-other", 10)):
                self.assertEqual(([request.headers["authorization"] for request in server.requests],
                                  server.connections), (["Bearer " + key] * count, 1))


if __name__ == "__main__":
    unittest.main()
