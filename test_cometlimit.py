"""What cometlimit promises, one class per promise. Nothing here leaves the machine.

Time and chance are replaced: a wait moves a clock that all share, so hardly any test sleeps.
"""
import asyncio
import collections
import concurrent.futures
import contextlib
import copy
import errno
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
import threading
import time
import traceback
import tracemalloc
import types
import unittest
import unittest.mock
import urllib.request
import warnings

import cometlimit

TIMEOUT = 20.0  # no wait in here is longer
FOLDER = os.path.dirname(os.path.abspath(cometlimit.__file__))
PROGRAM = [sys.executable, "-X", "dev", "-W", "error", "-m", "cometlimit"]
BOM = b"\xef\xbb\xbf"
KEY = "sk-Secret/Key<&>0123456789"


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


def close_idle(line):
    """An answer after which the server closes the connection without having said so."""
    return Line(line.send)


def hang_up():
    """The end of the connection without a byte."""
    return Line(lambda sock: None)


def reset():
    """The end of the connection by RST."""
    return Line(lambda sock: sock.setsockopt(
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


def drip(part, seconds, pause=0.02):
    """Bytes that trickle for so many seconds, in the status line, headers, body or chunks."""
    head = b"HTTP/1.1 200 OK\r\n"
    start, piece = {"status": (b"HTTP/1.1 200 ", b"O"), "headers": (head + b"X: ", b"y"),
                    "body": (head + b"Content-Length: 1000000\r\n\r\n", b" "),
                    "chunks": (head + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n")}[part]

    def send(sock):
        sock.sendall(start)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            sock.sendall(piece)
            time.sleep(pause)
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


class Listener:
    """A port of 127.0.0.1 with a thread for each connection; all end with the block."""

    def __enter__(self):
        self.sockets, self.threads, self.faults, self.connections = [], [], [], 0
        self.lock, self.ending, self.listener = threading.Lock(), False, socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen(128)
        self.port = self.listener.getsockname()[1]
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
        raise NotImplementedError

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


class Server(Listener):
    """Each request takes the next line of the script: a Line, or a function of the request that
    returns one. What is beyond the script gets `forever` or, without it, status 599. The block
    fails if a line is left. tls=NAME shows a certificate for that name, or address."""

    def __init__(self, *script, forever=None, tls=None):
        self.script, self.forever, self.tls = list(script), forever, tls
        self.requests = [] if forever is None else collections.deque(maxlen=1000)
        self.flying = self.peak = 0
        self.changed = threading.Condition()

    def __enter__(self):
        super().__enter__()
        self.url = "%s://127.0.0.1:%d/v1" % ("https" if self.tls else "http", self.port)
        return self

    def serve(self, sock, number):
        if self.tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate(self.tls))
            sock = self.own(context.wrap_socket(sock, server_side=True))
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
        super().__exit__(kind, *_)
        if kind is None and self.script:
            raise AssertionError("%d lines of the script were not used" % len(self.script))


class Proxy(Listener):
    """A proxy that keeps the head of each request in `heads`; refuse=407 says so to each; `slip`
    are bytes that it sends in the server's place after its own answer."""

    def __init__(self, refuse=None, slip=b""):
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


class Certificates:
    folder = None  # made by the first test that needs it


def certificate(name, signed=True):
    """The file of a certificate (and its key) for a name or an address, by the CA of "ca"; not
    signed: by itself. Skips the test where there is no openssl command."""
    if shutil.which("openssl") is None:
        raise unittest.SkipTest("there is no openssl command")
    if Certificates.folder is None:
        Certificates.folder = tempfile.mkdtemp()
    base = os.path.join(Certificates.folder, "%s%d" % (name, signed))
    if not os.path.exists(base + ".pem"):
        kind = "IP" if name[0].isdigit() else "DNS"
        extensions = ("CA:TRUE\nkeyUsage=critical,keyCertSign,cRLSign" if name == "ca" else
                      "CA:FALSE\nsubjectAltName=%s:%s" % (kind, name))
        with open(base + ".cnf", "w") as file:
            file.write("[req]\ndistinguished_name=dn\nprompt=no\n[dn]\nCN=%s\n[ext]\n"
                       "subjectKeyIdentifier=hash\n%sbasicConstraints=critical,%s\n" % (
                           name, "" if name == "ca" else "authorityKeyIdentifier=keyid\n",
                           extensions))

        def openssl(*words):
            subprocess.run(("openssl",) + words, check=True, stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL, timeout=TIMEOUT)
        own = name == "ca" or not signed
        openssl("req", "-new", "-newkey", "rsa:2048", "-nodes", "-config", base + ".cnf",
                "-keyout", base + ".key", "-out", base + ".csr")
        issuer = () if own else ("-CAcreateserial", "-CA", certificate("ca"), "-CAkey",
                                 certificate("ca")[:-4] + ".key")
        openssl("x509", "-req", "-days", "2", "-in", base + ".csr", "-out", base + ".crt",
                "-extfile", base + ".cnf", "-extensions", "ext",
                *(issuer or ("-signkey", base + ".key")))
        with open(base + ".pem", "w") as file:
            for end in (".crt", ".key"):
                with open(base + end) as part:
                    file.write(part.read())
    return base + ".pem"


def setUpModule():
    """Start the demo: it takes its time while the others run."""
    Compiled.folder = tempfile.mkdtemp()
    shutil.copy(os.path.join(FOLDER, "cometlimit.py"), Compiled.folder)
    environ = dict({name: value for name, value in os.environ.items()
                    if not re.match("(?i)cometapi_|.*_proxy$", name)}, PYTHONPATH=FOLDER)
    TheDemo.process = subprocess.Popen(PROGRAM + ["--demo"], env=environ, stdout=subprocess.PIPE,
                                       stderr=subprocess.PIPE)


def tearDownModule():
    shutil.rmtree(Compiled.folder)
    TheDemo.process.kill()
    TheDemo.process.wait()
    TheDemo.process.stdout.close()
    TheDemo.process.stderr.close()
    if Certificates.folder is not None:
        shutil.rmtree(Certificates.folder)


class Case(unittest.TestCase):
    """A clean environment; a clock that only waits move; chance always at the middle."""

    START = 1696004797.0  # Fri, 29 Sep 2023 16:26:37 GMT

    def setUp(self):
        kept = dict(os.environ)
        self.addCleanup(lambda: (os.environ.clear(), os.environ.update(kept)))
        for name in kept:
            if name.upper().startswith("COMETAPI_") or name.lower().endswith("_proxy") or name in (
                    "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE",
                    "SSLKEYLOGFILE", "PYTHONUNBUFFERED", "REQUEST_METHOD"):
                del os.environ[name]
        os.environ["SSL_CERT_FILE"] = os.devnull  # the system's CAs take 30 ms a client to load
        fast = unittest.mock.patch.object(cometlimit.Throttle, "START", 1000.0)
        fast.start()
        self.addCleanup(fast.stop)
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

    def client(self, server, **options):
        client = cometlimit.Client(**dict(dict(
            api_key=KEY, base_url=server.url, model="m", max_concurrency=1), **options))
        self.addCleanup(client.close)
        return client

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
        names = set(tree) | {"Client", "Completion", "Error", "Record", "Throttle", "ask_all",
                             "backoff"}
        self.assertLessEqual(names, set(cometlimit.__all__))
        for name in cometlimit.__all__:
            with self.subTest(name=name):
                self.assertTrue(inspect.getdoc(getattr(cometlimit, name)))
        for name, base in tree.items():
            self.assertIn(getattr(cometlimit, base), getattr(cometlimit, name).__bases__)
        self.assertTrue(issubclass(cometlimit.ConfigurationError, ValueError))
        self.assertRegex(cometlimit.__version__, r"^\d+\.\d+\.\d+$")

    def test_have_the_defaults_of_the_design(self):
        """Signatures and fields are exactly those of the design."""
        client, empty = cometlimit.Client, inspect.Parameter.empty
        self.assertEqual(parameters(client), dict(
            api_key=None, base_url=None, model=None, max_concurrency=5, max_retries=4,
            max_delay=30.0, timeout=600.0, deadline=None, ca_file=None, on_record=None))
        self.assertTrue(all(value.kind is value.KEYWORD_ONLY for value in
                            inspect.signature(client).parameters.values()))
        for method in (client.ask, client.complete, client.submit):
            self.assertEqual(parameters(method), dict(prompt=empty, params=empty))
        self.assertEqual(parameters(client.map), dict(
            prompts=empty, return_exceptions=False, params=empty))
        self.assertEqual(parameters(cometlimit.ask_all), dict(prompts=empty, client_options=empty))
        back = parameters(cometlimit.backoff)
        self.assertTrue(callable(back.pop("random")))
        self.assertEqual(back, dict(attempt=empty, retry_after=None, max_delay=30.0))
        self.assertEqual(list(parameters(cometlimit.Throttle)), ["max_delay", "random"])
        self.assertEqual(" ".join(cometlimit.Completion._fields), "text model finish_reason usage"
                         " request_id attempts latency body")
        self.assertEqual(" ".join(cometlimit.Record._fields), "time route model status latency"
                         " attempt waited request_id error prompt_tokens completion_tokens")

    def test_cost_nothing_to_import(self):
        """Importing opens nothing, starts nothing and reads no environment."""
        self.python("import os, random, ssl, urllib.request, http.client, email.utils, threading,"
                    " socket, concurrent.futures, logging, builtins\n"
                    "os.environ = socket.socket = None\nimport cometlimit\n"
                    "assert threading.active_count() == 1")

    def python(self, source):
        subprocess.run([sys.executable, "-c", source], check=True, timeout=TIMEOUT,
                       cwd=os.path.dirname(os.path.abspath(cometlimit.__file__)))


class Values(Case):
    """Completions, Records, Metrics and Errors travel between processes."""

    def test_survive_pickle_and_copy(self):
        """Every value and every error comes back equal, its details included."""
        script = {cometlimit.RateLimitError: failure("busy", 429),
                  cometlimit.APIStatusError: failure("bad", 400),
                  cometlimit.APIResponseError: failure("bad", 200),
                  cometlimit.APIConnectionError: hang_up(),
                  cometlimit.APITimeoutError: stall()}
        values = [self.outcome(line, max_retries=0, timeout=0.1) for line in script.values()]
        self.assertEqual([type(value) for value in values], list(script))
        values += [cometlimit.Error("e", attempts=2), cometlimit.ConfigurationError("c")]
        with Server(reply("yes")) as server, self.client(server) as client:
            done = client.complete("Hi")
            metrics = client.metrics
        values += [done, values[0].records[0], metrics]
        for value in values:
            for again in [pickle.loads(pickle.dumps(value, protocol)) for protocol in range(5)] + [
                    copy.copy(value), copy.deepcopy(value)]:
                with self.subTest(value=value):
                    self.assertIs(type(again), type(value))
                    if isinstance(value, cometlimit.Error):
                        self.assertEqual((str(again), vars(again)), (str(value), vars(value)))
                    elif value is metrics:
                        self.assertEqual({key: vars(stats) for key, stats in again.items()},
                                         {key: vars(stats) for key, stats in value.items()})
                    else:
                        self.assertEqual(again, value)

    def test_do_not_include_the_client(self):
        """A Client refuses to be pickled and says what to do."""
        with Server() as server, self.client(server) as client:
            with self.assertRaisesRegex(TypeError, "make one in each process"):
                pickle.dumps(client)


class OneQuestion(Case):
    """ask, complete and submit."""

    def test_is_posted_as_a_chat_completion(self):
        """The request is a POST of JSON with the key as a bearer and a User-Agent of its own."""
        with Server(reply("yes")) as server, self.client(server) as client:
            self.assertEqual(client.ask("Hi", temperature=0, stop=["é"], model="n"), "yes")
        request = server.requests[0]
        self.assertEqual((request.method, request.path), ("POST", "/v1/chat/completions"))
        self.assertEqual(request.body, {"model": "n", "temperature": 0, "stop": ["é"],
                                        "messages": [{"role": "user", "content": "Hi"}]})
        expected = {"authorization": "Bearer " + KEY, "content-type": "application/json",
                    "host": "127.0.0.1:%d" % server.port,
                    "user-agent": "cometlimit/" + cometlimit.__version__}
        self.assertEqual({name: request.headers[name] for name in expected}, expected)

    def test_may_be_a_conversation(self):
        """A list of messages goes out as it is."""
        talk = [{"role": "system", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
        with Server(reply("yes")) as server, self.client(server) as client:
            client.ask(talk)
        self.assertEqual(server.requests[0].body["messages"], talk)

    def test_is_answered_by_a_completion(self):
        """A Completion holds what the answer said, and what it took."""
        def slow(request):
            self.now += 2.5
            return reply("yes", {"x-cometapi-request-id": "r1"}, id="c1")
        done = self.outcome(status(503), slow)
        self.assertEqual(done[:-1], ("yes", "m-2024", "stop", {
            "prompt_tokens": 2, "completion_tokens": 3}, "r1", 2, 2.5))
        self.assertEqual(done.body["id"], "c1")

    def test_has_an_empty_text_where_the_model_calls_a_tool(self):
        """Content that is null, missing or in parts is no failure."""
        for message, text in (({"content": None, "tool_calls": [{}]}, ""), ({}, ""),
                              ({"content": [{"type": "text", "text": "a"}, {"text": "b"}]}, "ab")):
            with self.subTest(message=message):
                done = self.outcome(reply("", choices=[{"message": message,
                                                        "finish_reason": "length"}]))
                self.assertEqual((done.text, done.finish_reason), (text, "length"))

    def test_takes_key_and_address_from_the_environment(self):
        """White space and a byte order mark around them do not matter."""
        with Server(reply("yes"), reply("a"), reply("b")) as server:
            mark = "" if sys.getfilesystemencoding() == "ascii" else "\ufeff"  # 3.6, LC_ALL=C
            os.environ["COMETAPI_KEY"] = mark + " %s\r\n" % KEY
            os.environ["COMETAPI_BASE_URL"] = " %s/ \n" % server.url
            with cometlimit.Client(model="m") as client:
                self.assertEqual(client.ask("Hi"), "yes")
            self.assertEqual(sorted(cometlimit.ask_all(["1", "2"], model="m")), ["a", "b"])
            self.assertEqual(server.requests[0].headers["authorization"], "Bearer " + KEY)
        del os.environ["COMETAPI_BASE_URL"]
        self.assertEqual(repr(cometlimit.Client(model="m")), "<cometlimit.Client "
                         "https://api.cometapi.com/v1/chat/completions model='m'>")

    def test_keeps_the_connection(self):
        """One worker needs one connection, after failures too."""
        with Server(reply("a"), status(503, "busy"), reply("b"), reply("c")) as server:
            with self.client(server) as client:
                self.assertEqual([client.ask("Hi") for _ in range(3)], ["a", "b", "c"])
            self.assertEqual(server.connections, 1)

    def test_does_without_a_kept_connection(self):
        """A server that closes, announced or not, costs no attempt."""
        close = {"Connection": "close"}
        for line in (close_idle(reply("a", close)), close_idle(reply("a")),
                     raw(b'HTTP/1.0 200 OK\r\n\r\n{"choices": [{"message": {"content": "a"}}]}')):
            with self.subTest(), Server(line, reply("b")) as server:
                with self.client(server, max_retries=0) as client:
                    self.assertEqual([client.ask("Hi"), client.ask("Hi")], ["a", "b"])
                self.assertEqual(server.connections, 2)

    def test_is_sent_again_on_a_kept_connection_that_died(self):
        """Once, as the same attempt; a second hang-up counts."""
        with Server(reply("a"), hang_up(), reply("b")) as server, self.client(server) as client:
            client.ask("Hi")
            self.assertEqual(client.complete("Hi").attempts, 1)
        with Server(reply("a"), reset(), hang_up()) as server:
            with self.client(server, max_retries=0) as client:
                client.ask("Hi")
                with self.assertRaises(cometlimit.APIConnectionError) as caught:
                    client.ask("Hi")
        self.assertEqual(caught.exception.attempts, 1)

    def test_may_be_awaited(self):
        """submit's Future is one for asyncio.wrap_future."""
        loop = asyncio.new_event_loop()
        try:
            with Server(reply("yes")) as server, self.client(server) as client:
                future = client.submit("Hi")
                self.assertIsInstance(future, concurrent.futures.Future)
                done = loop.run_until_complete(asyncio.wrap_future(future, loop=loop))
        finally:
            loop.close()
        self.assertEqual(done.text, "yes")

    def test_can_be_cancelled_until_it_is_sent(self):
        """A cancelled prompt is not sent, and nobody waits for it in vain."""
        gate = threading.Event()

        def first(request):
            gate.wait(TIMEOUT)
            return reply("a")
        with Server(first, reply("b")) as server:
            with self.client(server) as client:
                calls = [client.submit(prompt) for prompt in "abc"]
                server.await_requests(1)
                self.assertEqual([calls[0].cancel(), calls[1].cancel()], [False, True])
                gate.set()
            self.assertEqual([calls[0].result().text, calls[2].result().text], ["a", "b"])


class ManyQuestions(Case):
    """map and ask_all."""

    def test_are_answered_in_order(self):
        """Whatever fails or overtakes, the answers come in the prompts' order."""
        failed = set()

        def line(request):
            number = int(request.prompt)
            if number % 3 == 0 and number not in failed:
                failed.add(number)
                return status((429, 503)[number % 2], headers={"Retry-After": "1"})
            return reply_echo(request)
        prompts = [str(number) for number in range(60)]
        with Server(forever=line) as server, self.client(server, max_concurrency=4) as client:
            self.assertEqual([done.text for done in client.map(prompts)], prompts)
        self.assertEqual(len(server.requests), 80)
        with Server(forever=line) as server:
            self.assertEqual(cometlimit.ask_all(prompts, api_key=KEY, base_url=server.url,
                                                model="m"), prompts)

    def test_are_never_more_than_max_concurrency_at_once(self):
        """The server never sees one more in flight, retries included."""
        for bound in (1, 3):
            gate, failed = threading.Barrier(bound), set()

            def line(request):
                if gate is not None and len(server.requests) <= bound:
                    gate.wait(TIMEOUT)   # all of them are here
                    time.sleep(0.05)     # room for one too many
                if request.prompt in failed:
                    return reply_echo(request)
                failed.add(request.prompt)
                return status(429) if int(request.prompt) % 2 else cut_short()
            with self.subTest(bound=bound), Server(forever=line) as server:
                with self.client(server, max_concurrency=bound) as client:
                    done = list(client.map(str(number) for number in range(12)))
                self.assertEqual([call.attempts for call in done], [2] * 12)
                self.assertEqual(server.peak, bound)

    def test_may_be_endless(self):
        """Of an endless source only 16 x max_concurrency prompts are taken ahead."""
        taken = []
        source = (taken.append(number) or str(number) for number in itertools.count())
        with Server(forever=reply_echo) as server:
            with self.client(server, max_concurrency=2) as client:
                answers = client.map(source)
                self.assertEqual(taken, [])
                for number in range(50):
                    self.assertEqual(next(answers).text, str(number))
                    self.assertLessEqual(len(taken), number + 1 + 32)
                answers.close()

    def test_yield_an_answer_before_they_take_another_prompt(self):
        """An answer whose turn it is does not wait for the source."""
        def source():
            yield "0"
            yield "1"
            server.await_requests(2)  # so the first answer is there
            yield "2"
            early.append("3")
        early = []
        with Server(forever=reply_echo) as server, self.client(server) as client:
            answers = client.map(source())
            self.assertEqual(next(answers).text, "0")
            self.assertEqual(early, [])
            answers.close()

    def test_stop_when_their_loop_is_left(self):
        """Nothing more is sent, what is in flight is hung up on, and the client lives on."""
        gone = [threading.Event() for _ in range(3)]

        def line(request):
            if request.prompt == "0":  # an answer earlier than the next prompts would be yielded
                server.await_requests(3)
            return reply_echo(request) if request.prompt in ("0", "after") else (
                stall(gone[int(request.prompt) - 1]))
        with Server(forever=line) as server:
            with self.client(server, max_concurrency=3) as client:
                for _ in client.map(str(number) for number in itertools.count()):
                    break
                for event in gone[:2]:
                    self.assertTrue(event.wait(TIMEOUT))
                self.assertEqual(client.ask("after"), "after")
            self.assertEqual({request.prompt for request in server.requests} - {"3"},  # no more
                             {"0", "1", "2", "after"})

    def test_raise_a_failure_in_its_turn(self):
        """The answers before it come; with return_exceptions it is a value among them."""
        def line(request):
            return status(400) if request.prompt == "2" else reply_echo(request)
        for values in (False, True):
            with self.subTest(return_exceptions=values), Server(forever=line) as server:
                with self.client(server, max_concurrency=3) as client:
                    got = []
                    with contextlib.suppress(cometlimit.APIStatusError):
                        for done in client.map(list("0123"), return_exceptions=values):
                            got.append(getattr(done, "text", type(done)))
            self.assertEqual(got, ["0", "1"] + [cometlimit.APIStatusError, "3"] * values)

    def test_survive_a_bad_prompt_among_them(self):
        """A prompt that cannot work fails in its turn, and the others are answered."""
        with Server(forever=reply_echo) as server, self.client(server) as client:
            got = list(client.map(["0", 1, "2", [], "4"], return_exceptions=True))
        self.assertEqual([getattr(done, "text", type(done)) for done in got], [
            "0", cometlimit.ConfigurationError, "2", cometlimit.ConfigurationError, "4"])

    def test_survive_a_source_that_raises(self):
        """The answers before it come, then the source's own exception, never as a value."""
        def source():
            yield "0"
            yield "1"
            raise KeyError("disk")
        for values in (False, True):
            with self.subTest(return_exceptions=values), Server(forever=reply_echo) as server:
                with self.client(server) as client:
                    with self.assertRaises(cometlimit.ConfigurationError):
                        list(client.map([5]))
                    got = []
                    with self.assertRaisesRegex(KeyError, "disk"):
                        for done in client.map(source(), return_exceptions=values):
                            got.append(done.text)
                self.assertEqual(got, ["0", "1"])

    def test_take_constant_memory(self):
        """What has been yielded is forgotten."""
        line, count = reply("x" * 50000), 300
        with Server(forever=lambda _: line) as server, self.client(server) as client:
            answers = client.map(map(str, itertools.count()))
            next(answers)
            gc.collect()
            tracemalloc.start()
            try:
                for _ in range(count):
                    next(answers)
                peak = tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()
                answers.close()
        self.assertLess(peak, 50000 * count / 4)

    def test_may_come_from_many_threads(self):
        """A client is shared by threads, and a callback may submit."""
        texts, lock = [], threading.Lock()

        def note(call):
            with lock:
                texts.append(call.result().text)

        def again(call):
            note(call)
            client.submit(call.result().text + "'").add_done_callback(note)
        with Server(forever=reply_echo) as server:
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
        self.assertLessEqual(server.peak, 3)


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
        for code in sorted(RETRIED) + list(GIVEN_UP):
            with self.subTest(code=code):
                self.check(code in RETRIED, status(code, headers={"Location": "/v1/other"}))

    def test_is_permanent_by_its_body_whatever_its_status(self):
        """A permanent code or type, in any case of letters, ends it at once."""
        statuses = itertools.cycle((200, 429, 500, 503))
        for word in sorted(set(PERMANENT) | cometlimit.PERMANENT):
            for words in ({"code": word}, {"code": "", "type": word}, {"code": word.upper()}):
                with self.subTest(**words):
                    self.check(False, failure(number=next(statuses), **dict({"code": ""}, **words)))

    def test_is_judged_as_the_gateway_means_it(self):
        """The rows of the gateway's own table."""
        for number, code, again in (
                (401, "", False), (403, "insufficient_user_quota", False), (403, "", False),
                (403, "pre_consume_token_quota_failed", False), (400, "", False),
                (500, "invalid_request", False), (500, "sensitive_words_detected", False),
                (413, "read_request_body_failed", False), (503, "model_not_found", False),
                (500, "get_channel_failed", True), (500, "do_request_failed", True),
                (500, "rate_limit_check_failed", True), (500, "new_api_panic", True),
                (404, "invalid_request_error", False), (501, "api_not_implemented", False),
                (429, "upstream_error", True), (429, None, True), (429, 1302, True),
                (503, "", True), (529, "overloaded_error", True)):
            with self.subTest(number=number, code=code):
                self.check(again, failure(code, number))
        for param, again in (("429", True), ("503", True), ("400", False), ("", True)):
            with self.subTest(param=param):
                self.check(again, failure("bad_response_status_code", 500, param=param))

    def test_is_judged_as_the_server_says(self):
        """x-should-retry decides, if it is exactly true or false."""
        for code, said, again in ((400, "true", True), (400, "True", False), (400, "1", False),
                                  (429, "false", False), (503, "false", False),
                                  (503, "False", True), (429, "true", True)):
            with self.subTest(code=code, said=said):
                self.check(again, status(code, headers={"x-should-retry": said}))

    def test_may_hide_in_a_200(self):
        """A 2xx without a completion is a failure; it may pass where it is no answer at all."""
        choices = [{"message": {"content": "no"}}]
        for body, again in (
                ("", True), ("<html>hi</html>", True), ('{"choices": [', True), ("\xff", True),
                ('{"choices": [{"message": {"content": "no"}}], "x": NaN}', True),
                ({"error": {"code": 429}}, True), ({"error": {"code": "503"}}, True),
                ({"error": {"code": 400}}, False), ({"error": {"code": 401}}, False),
                ({"error": {"message": "busy"}, "choices": choices}, True),
                ({"error": "busy"}, True), ({"error": {"code": "insufficient_quota"}}, False),
                ({"error": {"type": "invalid_request_error"}}, False),
                ({"choices": []}, False), ({"choices": None}, False), ({}, False), ([], False),
                ({"choices": [{}]}, False)):
            with self.subTest(body=body):
                error = self.check(again, status(200, body))
                self.assertTrue(again or type(error) is cometlimit.APIResponseError)

    def test_of_the_connection_may_pass(self):
        """A hang-up, a reset, a cut-off body: tried again, and told apart from an answer."""
        for line in (hang_up(), reset(), cut_short(), raw(b"HTTP/1.1 200 OK\r\nConte"),
                     raw(b"nonsense\r\n\r\n"), cut_short(503)):
            with self.subTest():
                self.check(True, line)
        with Server() as server:
            pass
        with self.assertRaises(cometlimit.APIConnectionError) as caught:
            self.client(server, max_retries=2).ask("Hi")
        self.assertEqual(caught.exception.attempts, 3)

    def test_ends_after_max_retries(self):
        """attempts = max_retries + 1, 5 by default, with a Record of each."""
        for options, attempts in (({}, 5), ({"max_retries": 0}, 1), ({"max_retries": 2}, 3)):
            with self.subTest(**options):
                error = self.outcome(*[status(503)] * attempts, **options)
                self.assertEqual((error.attempts, len(error.records)), (attempts, attempts))
                self.assertEqual([record.attempt for record in error.records],
                                 list(range(1, attempts + 1)))
                self.assertTrue(error.retryable)

    def test_says_what_happened(self):
        """Each class has its text, with the server's words, and its details."""
        said = {"message": "Slow down (request id: a) (request id: b)", "type": "requests",
                "param": "p", "code": "rate_limit_exceeded"}
        error = self.outcome(status(429, {"error": said}, {"Retry-After": "7"}), max_retries=0)
        self.assert_error(error, cometlimit.RateLimitError,
                          "HTTP 429 rate_limit_exceeded: " + said["message"], status_code=429,
                          retry_after=7.0, request_id="b", body={"error": said}, attempts=1, **said)
        error = self.outcome(status(401, {"error": {"message": "No", "code": 7}},
                                    {"x-request-id": "q", "x-oneapi-request-id": "r"}))
        self.assert_error(error, cometlimit.APIStatusError, "HTTP 401 7: No", status_code=401,
                          code="7", message="No", type=None, param=None, request_id="q")
        for line, kind, text in (
                (status(500), cometlimit.APIStatusError, "HTTP 500: an empty body"),
                (status(502, "<h1>Bad\n gateway</h1>"), cometlimit.APIStatusError,
                 "HTTP 502: <h1>Bad gateway</h1>"),
                (status(302, headers={"Location": "http://127.0.0.1:1/"}),
                 cometlimit.APIStatusError,
                 "HTTP 302: a redirect, which is not followed: check the base URL"),
                (status(200, "<html>"), cometlimit.APIResponseError, "HTTP 200: <html>"),
                (hang_up(), cometlimit.APIConnectionError, "no whole answer. RemoteDisconnected: "
                 "Remote end closed connection without response"),
                (stall(), cometlimit.APITimeoutError, "no answer in time")):
            with self.subTest(text=text):
                self.assert_error(self.outcome(line, max_retries=0, timeout=0.1), kind, text,
                                  retry_after=None, attempts=1)


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
        for most in (0.001, 1, 2.5, 1000):
            for attempt, hint in itertools.product((1, 3, 9, 99), (None, 0.5, 5, 1e9)):
                self.assertLessEqual(cometlimit.backoff(attempt, hint, most, lambda: 1.0), most)

    def test_is_kept_by_the_client(self):
        """One prompt waits exactly its backoff, cut at max_delay."""
        for options, waits in (({}, [1.0, 2.0, 4.0, 8.0]), ({"max_delay": 2}, [1.0, 1.6, 1.6, 1.6]),
                               ({"max_retries": 1}, [1.0])):
            with self.subTest(**options):
                error = self.outcome(*[hang_up()] * (len(waits) + 1), **options)
                self.assertEqual(error.attempts, len(waits) + 1)
                self.assertEqual([round(wait, 6) for wait in self.waits], waits)

    def hints(self, table, start, **options):
        """For each row (headers, asked, wait): what an answer with them asks for, and gets. A
        clock that is wrong by an hour changes nothing where the answer tells its Date."""
        for headers, asked, wait in table:
            if isinstance(headers, (str, bytes)):
                headers = [("Retry-After", headers)]
            for code, skew in ((429, None), (503, 0.0), (500, 3600.0), (429, -3600.0)):
                date = [] if skew is None else [("Date", cometlimit.email.utils.formatdate(
                    start, usegmt=True))]
                self.wall = start + (skew or 0.0)
                with self.subTest(headers=headers, code=code, skew=skew):
                    error = self.outcome(*[status(code, headers=headers + date)] * 2,
                                         **dict({"max_retries": 1}, **options))
                    self.assertEqual((error.retry_after, [round(w, 6) for w in self.waits]),
                                     (asked, [wait]))

    def test_obeys_retry_after_as_openai_does(self):
        """The rows of its test; beyond max_delay the wait is cut, not refused."""
        day = "Fri, 29 Sep 2023 "
        self.hints((("20", 20.0, 20.25), ("0", None, 1.0), ("-10", None, 1.0), ("60", 60.0, 30.0),
                    ("61", 61.0, 30.0), ("120", 120.0, 30.0), ("121", 121.0, 30.0),
                    (day + "16:26:57 GMT", 20.0, 20.25), (day + "16:26:37 GMT", None, 1.0),
                    (day + "16:26:27 GMT", None, 1.0), (day + "16:27:37 GMT", 60.0, 30.0),
                    (day + "16:27:38 GMT", 61.0, 30.0), (day + "16:28:37 GMT", 120.0, 30.0),
                    (day + "16:28:38 GMT", 121.0, 30.0), ("9" * 35, float("9" * 35), 30.0),
                    ("inf", None, 1.0), ("nan", None, 1.0),
                    ("Zun, 29 Sep 2023 16:26:27 GMT", None, 1.0),
                    ("Fri, 29 Sep 100000 16:26:57 GMT", None, 1.0), ("", None, 1.0),
                    ([("retry-after-ms", "120000")], 120.0, 30.0),
                    ([("retry-after-ms", "120001")], 120.001, 30.0)), self.START)
        error = self.outcome(*[status(429, headers={"Retry-After": ""})] * 4, max_retries=3)
        self.assertEqual((error.attempts, self.waits[0]), (4, 1.0))
        error = self.outcome(status(400, headers={
            "Retry-After": "Fri, 29 Sep 100000 16:26:57 GMT"}))
        self.assertEqual((error.status_code, error.attempts), (400, 1))

    def test_obeys_retry_after_as_urllib3_does(self):
        """The rows of its tests, in whatever time zone."""
        start, zone = 1559559600.0, os.environ.get("TZ")  # Mon, 3 Jun 2019 11:00:00 UTC
        self.hints((("0", None, 1.0), ("1000", 1000.0, 30.0), ("\t42 ", 42.0, 30.0),
                    ("-1", None, 1.0), ("+1", None, 1.0), ("1.0", 1.0, 1.25), ("\xb2", None, 1.0),
                    ("21600", 21600.0, 30.0), ("21601", 21601.0, 30.0)), start)
        self.hints((("1", 1.0, 1.0), ("2", 2.0, 1.0)), start, max_delay=1)
        try:
            for name in ("UTC0", "IST-2", "EST+5", zone):
                os.environ.pop("TZ", None)
                os.environ.update({"TZ": name} if name else {})
                time.tzset()
                with self.subTest(zone=name):
                    self.hints((("3600", 3600.0, 30.0),
                                ("Mon, 3 Jun 2019 12:00:00 UTC", 3600.0, 30.0),
                                ("Mon, 3 Jun 2019 11:00:00 UTC", None, 1.0),
                                ("Mon, 03 Jun 2019 11:30:12 GMT", 1812.0, 30.0),
                                ("Monday, 03-Jun-19 11:30:12 GMT", 1812.0, 30.0),
                                ("Mon Jun  3 11:30:12 2019", 1812.0, 30.0),
                                ("Mon Jun  3 11:00:10 2019", 10.0, 10.25)), start)
        finally:
            os.environ.pop("TZ", None)
            os.environ.update({"TZ": zone} if zone else {})
            time.tzset()

    def test_obeys_retry_after_in_all_forms(self):
        """The list that four clients were measured by."""
        def ms(value, seconds=None):
            return [("retry-after-ms", value)] + [("Retry-After", seconds)] * (seconds is not None)
        self.hints((("0", None, 1.0), ("1", 1.0, 1.25), ("30", 30.0, 30.0), ("1.5", 1.5, 1.75),
                    ("-10", None, 1.0), ("+5", None, 1.0), (" 7 ", 7.0, 7.25), ("31", 31.0, 30.0),
                    ("60", 60.0, 30.0), ("61", 61.0, 30.0), ("120", 120.0, 30.0),
                    ("121", 121.0, 30.0), ("3600", 3600.0, 30.0), ("86400", 86400.0, 30.0),
                    ("9" * 35, float("9" * 35), 30.0), ("9" * 400, float("inf"), 30.0),
                    ("1e400", None, 1.0), ("inf", None, 1.0), ("nan", None, 1.0),
                    ("1e1", None, 1.0), ("1_0", None, 1.0), ("", None, 1.0), ("abc", None, 1.0),
                    ("5, 5", None, 1.0), ("Fri, 29 Sep 2023 16:26:57 GMT", 20.0, 20.25),
                    ("Friday, 29-Sep-23 16:26:57 GMT", 20.0, 20.25),
                    ("Fri Sep 29 16:26:57 2023", 20.0, 20.25),
                    ("Zun, 29 Sep 2023 16:26:57 GMT", 20.0, 20.25),
                    ("Fri, 29 Sep 2023 16:26:57 -0000", 20.0, 20.25),
                    ("Fri, 29 Sep 2022 16:26:57 GMT", None, 1.0),
                    ("Fri, 29 Sep 100000 16:26:57 GMT", None, 1.0),
                    ("2023-09-29T16:26:57Z", None, 1.0), ("1m0s", None, 1.0),
                    ([("Retry-After", "1"), ("Retry-After", "5")], 5.0, 5.25),
                    ([("Retry-After", "x"), ("Retry-After", "5")], 5.0, 5.25),
                    (ms("500"), 0.5, 1.0), (ms("5500"), 5.5, 5.75), (ms("500", "9"), 0.5, 1.0),
                    (ms("abc", "9"), 9.0, 9.25), (ms("-5", "9"), 9.0, 9.25),
                    (ms("nan", "9"), 9.0, 9.25), (ms("0", "9"), 9.0, 9.25)), self.START)
        for said, waits in (("9", [9.25]), ("true", [1.0])):
            done = self.outcome(status(400, headers={"Retry-After": "9", "x-should-retry": said}),
                                *[reply("yes")] * (said == "true"))
            self.assertEqual(done.attempts, 1 + (said == "true"))


class ALimit(Case):
    """A refusal holds everybody of its model back."""

    def test_holds_its_model_back_and_no_other(self):
        """After a 429 nothing for that model leaves before Retry-After; others are not delayed."""
        gate = threading.Event()

        def refuse(request):
            gate.wait(TIMEOUT)
            return status(429, headers={"Retry-After": "20"})
        with Server(refuse, forever=reply_echo) as server:
            with self.client(server) as client:
                calls = [client.submit(name + str(number), model=name)
                         for number in range(3) for name in "ab"]
                gate.set()
                self.assertEqual([call.result(TIMEOUT).text for call in calls],
                                 ["a0", "b0", "a1", "b1", "a2", "b2"])
        requests = list(server.requests)
        self.assertEqual([request.prompt for request in requests[:4]], ["a0", "b0", "b1", "b2"])
        self.assertLess(requests[3].time, 1001.0)
        for request in requests[4:]:
            self.assertGreaterEqual(request.time, 1020.0)

    def test_is_told_to_the_logger(self):
        """What is tried again, and when the limit was met, is logged as information."""
        with self.assertLogs("cometlimit", "INFO") as logs:
            self.outcome(failure("busy", 429), reply("yes"))
        text = "\n".join(logs.output)
        self.assertRegex(text, "model m: limit met")
        self.assertIn("model m: attempt 1 of 5: HTTP 429 busy: why; next in 1.0 s", text)


class ARecord(Case):
    """Every HTTP attempt leaves one."""

    def test_tells_everything_of_its_attempt(self):
        """It goes to on_record, to the logger and to the error, field by field."""
        def slow(line):
            def step(request):
                self.now += 0.5
                return line
            return step
        records = []
        with self.assertLogs("cometlimit", "DEBUG") as logs:
            self.outcome(slow(failure("busy", 429, message="x (request id: r7)")),
                         slow(cut_short()), slow(status(503)),
                         slow(reply("yes", {"x-request-id": "r8"})),
                         on_record=records.append)
        rest = (self.START, "/v1/chat/completions", "m")
        self.assertEqual([record._replace(waited=round(record.waited, 3)) for record in records], [
            rest + (429, 0.5, 1, 0.0, "r7", "busy", 0, 0),
            rest + (None, 0.5, 2, 1.1, None, "connection_error", 0, 0),  # the throttle's pause
            rest + (503, 0.5, 3, 2.0, None, "http_503", 0, 0),
            rest + (200, 0.5, 4, 4.0, "r8", None, 2, 3)])
        self.assertEqual([log.getMessage() for log in logs.records if log.levelname == "DEBUG"],
                         [repr(record) for record in records])
        for error in (self.outcome(stall(), timeout=0.1, max_retries=0),
                      self.outcome(status(200, "x"), max_retries=0)):
            self.assertEqual([record.error for record in error.records], [error.code])
        self.assertEqual(error.code, "invalid_response")

    def test_breaks_nothing_where_it_is_used_badly(self):
        """Whatever on_record raises, sys.exit() included, the answer comes and it is logged."""
        for bad in (sys.exit, lambda record: 1 / 0, lambda: None):
            with self.subTest(), self.assertLogs("cometlimit", "ERROR") as logs:
                self.assertEqual(self.outcome(status(503), reply("yes"), on_record=bad).text, "yes")
            self.assertEqual([log.getMessage() for log in logs.records], ["on_record failed"] * 2)

    def test_breaks_nothing_where_a_log_handler_raises(self):
        """A logger that fails does not cost an answer."""
        class Bad(logging.Handler):
            def emit(self, record):
                raise OSError("disk full")
        handler, logger = Bad(), logging.getLogger("cometlimit")
        logger.addHandler(handler)
        self.addCleanup(logger.removeHandler, handler)
        with Server(reply("yes")) as server:
            client = self.client(server)
            logger.setLevel("DEBUG")
            try:
                self.assertEqual(client.submit("Hi").result(1.0).text, "yes")
            finally:
                logger.setLevel("NOTSET")


class TheMetrics(Case):
    """Client.metrics."""

    def test_add_up(self):
        """Requests, answers, statuses, retries, tokens and latencies by route and model."""
        def after(seconds, line=reply("yes")):
            def step(request):
                self.now += seconds
                return line
            return step
        with Server(after(1, status(503)), *[after(number) for number in range(1, 21)]) as server:
            with self.client(server) as client:
                empty = client.metrics
                list(client.map(["Hi"] * 19))
                before = client.metrics
                client.ask("Hi", model="n")
                metrics = client.metrics
        key, other = ("/v1/chat/completions", "m"), ("/v1/chat/completions", "n")
        self.assertEqual((dict(empty), list(before), list(metrics)), ({}, [key], [key, other]))
        for total, times in ((metrics, 1), (metrics + empty, 1), (metrics + metrics, 2)):
            stats = total[key]
            self.assertEqual((stats.requests, stats.answers, stats.retries, stats.prompt_tokens,
                              stats.completion_tokens), tuple(times * number for number in
                                                              (20, 19, 1, 38, 57)))
            self.assertEqual(dict(stats.statuses), {200: 19 * times, 503: times})
            self.assertEqual(total[other].requests, times)
            for share, value in ((0.5, 10), (0.95, 19), (1.0, 19)):
                self.assertLess(abs(stats.latency(share) / value - 1), 0.03)
        self.assertEqual((stats.pace, stats.window), (None, None))
        self.assertEqual(dict((before + metrics)[key].statuses), {200: 38, 503: 2})

    def test_count_what_had_no_answer(self):
        """An attempt without an answer has the status None."""
        with Server(hang_up(), reply("yes")) as server, self.client(server) as client:
            client.ask("Hi")
            (stats,) = client.metrics.values()
        self.assertEqual(dict(stats.statuses), {None: 1, 200: 1})


class ADeadline(Case):
    """timeout is for an attempt, deadline for a prompt."""

    def test_is_not_overrun_by_waits(self):
        """A prompt is given up, with its last error, rather than tried again too late."""
        error = self.outcome(status(503), status(503), deadline=2.9)
        self.assertEqual((error.status_code, error.attempts, error.records[1].waited),
                         (503, 2, 1.0))
        error = self.outcome(status(429, headers={"Retry-After": "20"}), deadline=20)
        self.assertEqual((error.retry_after, error.attempts), (20.0, 1))

    def test_passes_in_the_line_too(self):
        """What has not been sent by then fails at that moment."""
        gate = threading.Event()

        def refuse(request):
            gate.wait(TIMEOUT)
            return status(429, headers={"Retry-After": "20"})
        with Server(refuse) as server, self.client(server, deadline=5.0) as client:
            first, second = client.submit("a"), client.submit("b")
            gate.set()
            self.assertEqual(first.exception(TIMEOUT).attempts, 1)
            self.assert_error(second.exception(TIMEOUT), cometlimit.APITimeoutError,
                              "not sent before its deadline", attempts=0, records=())
        self.assertEqual(self.now, 1005.0)

    def test_ends_an_attempt(self):
        """An attempt takes no longer than timeout, nor longer than what is left."""
        error = self.outcome(stall(), stall(), timeout=0.1, max_retries=1)
        self.assert_error(error, cometlimit.APITimeoutError, "no answer in time", attempts=2)
        error = self.outcome(stall(), deadline=0.1)
        self.assert_error(error, cometlimit.APITimeoutError, "no answer in time", attempts=1)

    def test_is_not_stretched_by_a_server_that_drips(self):
        """The timeout is hard, whichever part of the answer trickles."""
        self.real_time()
        parts = ["status", "headers", "body", "chunks"]
        with Server(*[drip(part, 3.0) for part in parts]) as server:
            with self.client(server, timeout=0.3, max_retries=0, max_concurrency=4) as client:
                for error in client.map(parts, return_exceptions=True):
                    self.assertIs(type(error), cometlimit.APITimeoutError)
                    self.assertLess(error.records[0].latency, 1.5)


class BadInput(Case):
    """Is a ConfigurationError that says what was met, before anything is sent."""

    def refused(self, text, job):
        with self.assertRaises(cometlimit.ConfigurationError) as caught:
            job()
        self.assertEqual(str(caught.exception), text)
        self.assertEqual((caught.exception.attempts, caught.exception.retryable), (0, False))
        shown = "".join(traceback.format_exception(type(caught.exception), caught.exception,
                                                   caught.exception.__traceback__))
        self.assertNotIn(KEY, shown + repr(vars(caught.exception)))

    def test_of_the_constructor(self):
        """Numbers, callbacks and files are checked."""
        whole = "%s is a whole number from %d, not %r"
        span = "%s is a number of seconds above 0, not %r"
        table = [(name, value, whole % (name, least, value)) for name, least, values in (
            ("max_concurrency", 1, (0, -1, 2.5, True, "5", None)),
            ("max_retries", 0, (-1, 1.0, False, "4", None))) for value in values]
        table += [(name, value, span % (name, value)) for name in ("max_delay", "timeout",
                                                                   "deadline")
                  for value in (0, -1, "30", True, NAN, float("inf"), float("-inf"),
                                1e300)]  # which no clock of a thread can wait for
        table += [("timeout", None, span % ("timeout", None)), ("on_record", 5, "on_record is a "
                                                                "function of a Record, not 5")]
        for name, value, text in table:
            with self.subTest(name=name, value=value):
                self.refused(text, lambda: cometlimit.Client(**{"api_key": KEY, name: value}))
        with self.assertRaisesRegex(cometlimit.ConfigurationError, "ca_file.*/no/file"):
            cometlimit.Client(api_key=KEY, ca_file="/no/file")

    def test_of_the_key(self):
        """A missing key, or one with a character that no key has, is never shown."""
        missing = "there is no API key: set COMETAPI_KEY, or pass api_key="
        for key in (None, "", " \r\n\ufeff", b"sk", 5):
            with self.subTest(key=key):
                self.refused(missing, lambda: cometlimit.Client(api_key=key))
        for sign in " \n\r\t\0\x7f\xa0\xe9\u2019\u200b\ufeff":
            with self.subTest(sign=sign):
                self.refused("the API key has a character that no key has (a space, a line break, "
                             "a typographic quote): copy it again",
                             lambda: cometlimit.Client(api_key=KEY + sign + KEY))

    def test_of_the_address(self):
        """Whatever is no https address, or http of this machine, is refused."""
        with self.assertRaises(ValueError) as caught:
            self.assertIsNone(cometlimit.urllib.parse.urlsplit("http://h:65536").port)
        port = str(caught.exception)  # in the words of this Python
        plain = "http:// would show the key on its way (https:// would not)"
        for url, text in (
                ("", "https:// is missing"), ("example.com/v1", "https:// is missing"),
                ("ftp://example.com", "https:// is missing"),
                ("file:///etc/passwd", "https:// is missing"),
                ("https:///v1", "no host or no port"), ("https://h:0/v1", "no host or no port"),
                ("https://h/v1?a=b", "a query or a fragment"), ("https://h/v1?",
                                                                "a query or a fragment"),
                ("https://h/v1#top", "a query or a fragment"), ("http://example.com/v1", plain),
                ("http://127.0.0.1.example.com", plain), ("http://0.0.0.0", plain),
                ("http://localhost.example.com", plain), ("https://h:65536/v1", port),
                ("https://h/v 1", "a character that no URL has"),
                ("https://h/v\xe9", "a character that no URL has")):
            with self.subTest(url=url):
                self.refused("the base URL %r cannot be used: %s" % (url, text),
                             lambda: cometlimit.Client(api_key=KEY, base_url=url))
        for user in ("user", KEY.replace("/", ""), "user:word"):
            self.refused("the base URL 'https://***@h/v1' cannot be used: a user name (the key "
                         "goes into COMETAPI_KEY)", lambda: cometlimit.Client(
                             api_key=KEY, base_url="https://%s@h/v1" % user))
        for url in ("https://h:x/v1", "https://[::1/v1", "https://%s.com" % ("a" * 64)):
            with self.subTest(url=url), self.assertRaises(cometlimit.ConfigurationError):
                cometlimit.Client(api_key=KEY, base_url=url)
        for url in ("http://localhost:1/v1", "http://[::1]:1", "http://127.1.2.3/",
                    "https://h:65535", "HTTPS://H/v1/", "https://h/v1/chat/completions/"):
            with self.subTest(url=url):
                self.assertRegex(repr(cometlimit.Client(api_key=KEY, base_url=url)),
                                 "[^/]/chat/completions model=None>$")

    def test_may_surround_the_key(self):
        """White space and a byte order mark, even as 3.6 reads its bytes in the C locale."""
        for before, after in ((" \ufeff", "\r\n"), ("\udcef\udcbb\udcbf", " \n")):
            with self.subTest(before=before), Server(reply("yes")) as server:
                self.client(server, api_key=before + KEY + after).ask("Hi")
            self.assertEqual(server.requests[0].headers["authorization"], "Bearer " + KEY)

    def test_does_not_show_a_key_in_the_address(self):
        """Wherever in the base URL the key was pasted, it is not shown."""
        for url in ("https://h/v1?key=" + KEY, "https://h/v1#" + KEY, KEY, "https://u:%s@h" % KEY,
                    "http://%s/v1" % KEY, "https://h:" + KEY):
            with self.subTest(url=url):
                try:
                    cometlimit.Client(api_key=KEY, base_url=url)
                except cometlimit.ConfigurationError:
                    self.assertNotIn(KEY, traceback.format_exc())
                else:
                    self.fail("accepted")

    def test_of_the_request(self):
        """A prompt is text or messages, its parameters are JSON, and nothing is sent otherwise."""
        loop = []
        loop.append(loop)
        prompt = "a prompt is a string or a list of messages (dicts), not %s"
        model = 'no model is named: Client(model="your-model-id")'
        with Server() as server, self.client(server) as client:
            for bad, params, text in (
                    (5, {}, prompt % "int"), (None, {}, prompt % "NoneType"),
                    (b"Hi", {}, prompt % "bytes"), ({"role": "user"}, {}, prompt % "dict"),
                    ("Hi", {"stream": True}, "stream cannot be used: answers come whole"),
                    ("Hi", {"model": ""}, model), ("Hi", {"model": None}, model),
                    ("Hi", {"model": 5}, model)):
                with self.subTest(bad=bad, **params):
                    self.refused(text, lambda: client.ask(bad, **params))
            for bad in ([], ["Hi"], [{"role": "user"}, "Hi"]):
                with self.subTest(bad=bad), self.assertRaises(cometlimit.ConfigurationError):
                    client.ask(bad)
            for value in (NAN, float("inf"), {1, 2}, b"x", object(), loop, {(1, 2): 3}):
                with self.subTest(value=value), self.assertRaisesRegex(
                        cometlimit.ConfigurationError, "the request cannot be made JSON: "):
                    client.submit("Hi", temperature=value)
            self.refused("prompts is a list of prompts; for a single one there is ask()",
                         lambda: list(client.map("Hi")))
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
        """In a body that is JSON, and in one that is none; what stands before it stays."""
        for form in (KEY, json.dumps(KEY)[1:-1], KEY.replace("/", "\\/"),
                     "".join("\\u%04X" % ord(sign) for sign in KEY)):
            for text in ("<p>%s</p>", "[1, %s", '{"a": "b\\\\%s"}'):
                with self.subTest(form=form, text=text):
                    body = self.outcome(status(401, text % form)).body
                    shown = json.dumps(body) if isinstance(body, dict) else body
                    self.assertEqual(shown, text % "***")

    def test_does_not_follow_a_redirect(self):
        """No other host, and no other path, ever sees it."""
        with Server() as other:
            for code in (301, 302, 303, 307, 308):
                url = "http://127.0.0.1:%d/v1" % other.port
                error = self.outcome(status(code, headers={"Location": url}))
                self.assertEqual((error.status_code, error.attempts), (code, 1))
        self.assertEqual(other.connections, 0)


class TheEnd(Case):
    """Whatever waits can be woken, and nothing runs on."""

    def test_of_a_with_block_waits_for_what_was_submitted(self):
        """All is answered, and its callbacks have run."""
        texts = []
        with Server(*[status(503)] * 2, forever=reply_echo) as server:
            with self.client(server, max_concurrency=2) as client:
                for number in range(20):
                    client.submit(str(number)).add_done_callback(
                        lambda call: texts.append(call.result().text))
            self.assertEqual(sorted(texts, key=int), [str(number) for number in range(20)])
            self.assertEqual(len(server.requests), 22)

    def test_of_a_with_block_does_not_wait_for_what_was_cancelled(self):
        """A cancelled prompt that was still held back does not hold the block."""
        self.real_time()
        with Server(forever=reply_echo) as server:
            client = self.client(server)
            calls = [client.submit(str(number)) for number in range(8)]
            calls[-1].cancel()
            leaving = threading.Thread(target=client.__exit__, args=(None,) * 3, daemon=True)
            leaving.start()
            leaving.join(3.0)
            self.assertFalse(leaving.is_alive(), "waits for ever")

    def test_of_what_is_cancelled_does_not_wait_for_its_turn(self):
        """Held back by a refusal, it holds neither the block nor who waits for it."""
        self.real_time()
        with Server(status(429, headers={"Retry-After": "20"})) as server:
            start = time.monotonic()
            with self.client(server, max_retries=0) as client:
                first, second = client.submit("a"), client.submit("b")
                self.assertEqual(first.exception(TIMEOUT).status_code, 429)
                self.assertTrue(second.cancel() and second.cancel())
                self.assertEqual(concurrent.futures.wait([second], TIMEOUT).done, {second})
            self.assertLess(time.monotonic() - start, 3.0)

    def test_of_a_with_block_by_an_exception_is_immediate(self):
        """What waits fails, what is in flight is hung up on."""
        self.real_time()
        gone = threading.Event()
        with Server(stall(gone)) as server:
            with self.assertRaises(ZeroDivisionError), self.client(server) as client:
                calls = [client.submit("Hi") for _ in range(3)]
                server.await_requests(1)
                1 / 0
            self.assertTrue(gone.wait(TIMEOUT))
            for call in calls:
                self.assert_error(call.exception(0), cometlimit.Error, GONE)

    def test_wakes_whatever_waits(self):
        """close() ends what is in flight, in backoff and in the line, in less than a second."""
        self.real_time()
        gone, seen = threading.Event(), threading.Event()
        with Server(status(503), stall(gone)) as server:
            client = self.client(server, on_record=lambda record: seen.set())
            rests = client.submit("rests")
            self.assertTrue(seen.wait(TIMEOUT))
            flies, waits = client.submit("flies"), client.submit("waits")
            server.await_requests(2)
            start = time.monotonic()
            client.close()
            for call in (rests, flies, waits):
                self.assert_error(call.exception(TIMEOUT), cometlimit.Error, GONE)
            self.assertEqual([rests.exception().attempts, waits.exception().attempts], [1, 0])
            self.assertLess(time.monotonic() - start, 1.0)
            self.assertTrue(gone.wait(TIMEOUT))
            with self.assertRaisesRegex(cometlimit.ConfigurationError,
                                        "the client is closed: make a new one"):
                client.ask("Hi")
            client.close()
        self.threads_end()

    def test_comes_to_idle_threads(self):
        """A client that is forgotten leaves no thread behind."""
        self.real_time()
        idle, cometlimit._IDLE = cometlimit._IDLE, 0.05
        try:
            with Server(forever=reply_echo) as server:
                client = self.client(server, max_concurrency=3)
                list(client.map(list("0123456")))
                self.threads_end()
                self.assertEqual(client.ask("again"), "again")
        finally:
            cometlimit._IDLE = idle

    def test_by_ctrl_c_is_quick(self):
        """The process is gone in less than a second, whatever it waits for."""
        source = ("import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
                  "import cometlimit\n"
                  "with cometlimit.Client(api_key=%r, base_url=%r, model='m') as client:\n    %s")
        held = status(429, headers={"Retry-After": "30"})
        for line, job in ((stall(), "client.ask('Hi')"), (held, "client.ask('Hi')"),
                          (stall(), "list(client.map(map(str, range(100))))"),
                          (stall(), "for _ in range(9): client.submit('Hi')")):
            with self.subTest(job=job), Server(forever=line) as server:
                process = subprocess.Popen(
                    [sys.executable, "-c", source % (KEY, server.url, job)],
                    cwd=os.path.dirname(os.path.abspath(cometlimit.__file__)),
                    stdout=subprocess.PIPE, stderr=subprocess.PIPE)
                with process:
                    try:
                        server.await_requests(1)
                        time.sleep(0.05)
                        start = time.monotonic()
                        process.send_signal(signal.SIGINT)
                        text = process.communicate(timeout=TIMEOUT)[1].decode()
                        took = time.monotonic() - start
                    finally:
                        process.kill()
                self.assertIn("KeyboardInterrupt", text)
                self.assertNotIn("Exception in thread", text)
                self.assertLess(took, 1.0)

    def test_of_a_callback_is_not_that_of_a_thread(self):
        """A callback that raises, sys.exit() included, costs no other answer."""
        with Server(forever=reply_echo) as server:
            client, gate = self.client(server), threading.Event()
            for fault, logger in ((ValueError, "concurrent.futures"), (SystemExit, "cometlimit")):
                def bad(call, fault=fault):
                    gate.wait(TIMEOUT)
                    raise fault("callback")
                with self.subTest(fault=fault), self.assertLogs(logger, "ERROR"):
                    client.submit("a").add_done_callback(bad)
                    gate.set()
                    self.assertEqual(client.submit("b").result(TIMEOUT).text, "b")
                    client._pool.join()

    @unittest.skipUnless(hasattr(os, "fork"), "there is no fork here")
    def test_of_a_fork_is_of_no_concern_to_the_other(self):
        """A child has connections and threads of its own; the parent's live on."""
        with Server(forever=reply_echo) as server, self.client(server) as client:
            self.assertEqual(client.ask("a"), "a")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the newest warn of a fork with threads
                child = os.fork()
            if not child:
                try:
                    os._exit(client.ask("b") != "b")
                finally:
                    os._exit(2)
            self.assertEqual(client.ask("c"), "c")
            self.assertEqual(os.waitpid(child, 0)[1], 0)
            self.assertEqual({request.prompt: request.connection for request in server.requests},
                             {"a": 1, "b": 2, "c": 1})


class TheWire(Case):
    """TLS and proxies, lightly."""

    def test_is_verified_tls(self):
        """A private CA is trusted where it is named, by option or environment; no other is."""
        authority, _ = certificate("ca"), certificate("127.0.0.1")
        with Server(reply("yes"), tls="127.0.0.1") as server:
            self.assertEqual(self.client(server, ca_file=authority).ask("Hi"), "yes")
            with self.assertRaisesRegex(cometlimit.APIConnectionError, "not trusted") as caught:
                self.client(server).ask("Hi")
            self.assertEqual(caught.exception.attempts, 1)
        for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"):
            os.environ[name] = authority
            with self.subTest(name=name), Server(reply("yes"), tls="127.0.0.1") as server:
                self.assertEqual(self.client(server).ask("Hi"), "yes")
            del os.environ[name]

    def test_goes_through_a_proxy(self):
        """By CONNECT for https; a proxy that refuses is told, once."""
        authority, _ = certificate("ca"), certificate("127.0.0.1")
        with Proxy() as proxy, Server(reply("yes"), tls="127.0.0.1") as server:
            os.environ["https_proxy"] = "http://me:p%%40ss@127.0.0.1:%d" % proxy.port
            with self.client(server, ca_file=authority) as client:
                self.assertEqual(client.ask("Hi"), "yes")
            self.assertRegex(proxy.heads[0], r"\ACONNECT 127\.0\.0\.1:%d " % server.port)
            self.assertNotIn(KEY, "".join(proxy.heads))
        with Proxy(refuse=407) as proxy, Server(tls="127.0.0.1") as server:
            os.environ["https_proxy"] = "127.0.0.1:%d" % proxy.port
            with self.assertRaisesRegex(cometlimit.APIConnectionError, "the proxy refuses.*407"):
                self.client(server, ca_file=authority).ask("Hi")
            self.assertEqual(len(proxy.heads), 1)


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


class Compiled:
    """A copy of the module where its bytecode may stay: processes start twice as fast by it."""

    folder = None


class CommandLine(Case):
    """A folder of its own, a key and a server's address in the environment, and the real clock."""

    def setUp(self):
        super().setUp()
        self.real_time()
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(folder.name)
        os.environ.update(COMETAPI_KEY=KEY, PYTHONPATH=Compiled.folder)
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
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

    def cli(self, *argv, stdin=b"", expect=0):
        """Run main() in this process; leaves self.out (bytes) and self.err (a text)."""
        kept = sys.stdin, sys.stdout, sys.stderr
        with tempfile.TemporaryFile() as file:
            file.write(stdin)
            file.seek(0)
            sys.stdin = io.TextIOWrapper(file, "ascii")
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
        """What looks like JSON or has line ends is still one prompt, and reaches the model."""
        prompts = ['{"prompt": "x"}', '"quoted"', "[1]", "two\nlines", " spaces ", "é\u2028"]
        with self.serve(forever=reply_echo):
            self.assertEqual(json.loads(self.cli(*prompts).decode()), prompts)

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

    def test_are_answered_readably(self):
        """Letters of all scripts stand as themselves, half surrogates as escapes."""
        with self.serve(reply("Grüße 漢字 \U0001f600")):
            out = self.cli("a").decode()
        self.assertIn("Grüße 漢字 \U0001f600", out)
        with self.serve(reply("half \ud83d")):
            self.assertEqual(self.cli("a"), b'["half \\ud83d"]\n')

    def test_have_their_places_even_after_a_stop(self):
        """However a run ends, the array has a place for every prompt, null without an answer."""
        tired = self.tiring(status(401, "bad key"))
        with self.serve(forever=lambda request: reply("0") if request.prompt == "0" else (
                tired(request))):
            out = self.cli("-c", "1", *map(str, range(30)), expect=3)
        self.assertEqual(json.loads(out.decode()), ["0"] + [None] * 29)

        def late(request):
            if request.prompt == "0":
                return status(503)
            server.await_requests(3)
            time.sleep(0.5)
            return reply_echo(request)
        with self.serve(forever=late) as server:
            process = self.start("-c", "3", "--max-retries", "4", "0", "1", "2")
            server.await_requests(3)
            time.sleep(0.2)
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
                self.assertRegex(self.err, error["message"][:30].replace("(", r"\("))
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
                (b'{"messages": [{"role": "user", "content": ""}]}\n', "line-1.*empty")):
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

    def test_with_one_name_are_refused(self):
        """Two rows of one custom_id end the run before anything is sent."""
        for again in ({"custom_id": "r0", "prompt": "x"}, {"custom_id": "line-1", "prompt": "x"}):
            with self.subTest(again=again), self.serve():
                self.write("in", ["text"] + rows(2) + [again])
                self.cli("-i", "in", "-o", "out", expect=2)
                self.assertIn(repr(again["custom_id"]), self.err)

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
                (hang_up(), None, "connection_error"), (stall(), None, "timeout")):
            with self.subTest(error=error), self.serve(script):
                self.write("in", rows(1))
                row = json.loads(self.cli("-q", "-i", "in", "--timeout", "0.3",
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
        self.assertEqual(self.answers(), [
            ("r0", "0"), ("r1", "p1"), ("r2", "2"), ("r3", "p3")])
        self.refused("-i", "in", "-o", "in", words="is the input")
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
                (True, said({"choices": []}, [])),
                (False, {})):
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
        """Half a row is asked again, a whole one without its newline is not."""
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

    def test_refuses_a_row_that_has_changed(self):
        """A custom_id that now asks something else ends the run; from a pipe, nothing is lost."""
        with self.serve(forever=reply_echo):
            self.cli("-i", "in", "-o", "out")
        self.write("in", [dict(rows(1)[0], prompt="changed")] + rows(3, 1))
        self.refused(words="another input")
        self.write("in", rows(3))
        self.refused(words="another input")
        with self.serve(forever=reply_echo):
            process = self.start("-i", "-", "-o", "out")
            process.communicate(line(dict(rows(1)[0], prompt="changed")), TIMEOUT)
        self.assertEqual({name for name, text in self.answers() if text == "p" + name[1:]},
                         {"r0", "r1", "r2", "r3"})

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
            for kill in range(3):
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
        self.assertLessEqual(len(asked), count + 3 * width)
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
            self.cli("-i", "in", "-o", "/dev/full", expect=3)
            self.finish(self.start("-i", "in", stdout=full), 3)
            self.finish(self.start("-i", "in", "-o", "out", stderr=full), 0)
            os.unlink("out")
            self.finish(self.start("-i", "in", "-o", "out", "--joblog", "/dev/full"), 0)
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
            out = self.finish(self.start("-q", "Grüße 漢".encode()), 0)
        self.assertEqual(server.requests[0].prompt, "Grüße 漢")
        self.assertEqual(out.decode(), '["Grüße 漢"]\n')


class ASignal(CommandLine):

    def test_lets_what_is_in_flight_come_back(self):
        """Nothing more is sent, not even again; what was sent is written; 128 + N."""
        for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)):
            def late(request):
                server.await_requests(2)
                time.sleep(0.3)
                return status(503) if request.prompt == "p1" else reply_echo(request)
            with self.subTest(number=number), self.serve(forever=late) as server:
                self.write("in", rows(50))
                process = self.start("-c", "2", "--max-retries", "4", "-i", "in", "-o", "out")
                server.await_requests(2)
                process.send_signal(number)
                self.finish(process, code)
                self.assertEqual(len(server.requests), 2)
                self.assertEqual(self.answers()[0], ("r0", "p0"))
                self.assertIn("to go on", self.err)
                os.unlink("out")

    def test_that_comes_twice_ends_at_once(self):
        """The second one waits for nothing; the file stays good."""
        with self.serve(reply("0"), stall(), stall()) as server:
            self.write("in", rows(9))
            process = self.start("-c", "1", "-i", "in", "-o", "out")
            server.await_requests(2)
            process.send_signal(signal.SIGINT)
            time.sleep(0.3)
            self.assertIsNone(process.poll())
            began = time.monotonic()
            process.send_signal(signal.SIGINT)
            self.finish(process, 130)
            self.assertLess(time.monotonic() - began, 1.0)
            server.script.clear()
        self.assertEqual(self.answers(), [("r0", "0")])

    def test_needs_no_end_of_the_input(self):
        """A run whose stdin stays open, or is still being read, ends as cleanly."""
        with self.serve(reply("yes")) as server:
            process = self.start("-o", "out")
            process.stdin.write(b"a\n")
            process.stdin.flush()
            server.await_requests(1)
            time.sleep(0.3)
            process.send_signal(signal.SIGINT)
            process.wait(TIMEOUT)  # stdin is closed later
            self.finish(process, 130)
        cases = [("fifo1",), ("fifo2", "--dry-run"), ("fifo3", "--shard", "1/1")]
        for name, *_ in cases:
            os.mkfifo(name)
        cases = [(name, self.start("-i", name, *argv)) for name, *argv in cases]
        for name, process in cases:
            with open(name, "wb"):  # which waits for its reader
                time.sleep(0.1)
                process.send_signal(signal.SIGTERM if name == "fifo2" else signal.SIGINT)
                process.wait(5)
            self.finish(process, 143 if name == "fifo2" else 130)

    def test_is_ignored_where_it_was(self):
        """As under nohup, or behind an & of a shell: it ends nothing."""
        ignoring = ("import os, signal, sys\nfor n in (1, 2): signal.signal(n, signal.SIG_IGN)\n"
                    "os.execv(sys.argv[1], sys.argv[1:])")
        self.write("in", rows(2))
        with self.serve(forever=lambda request: time.sleep(0.3) or reply_echo(request)) as server:
            process = self.start("-i", "in", "-o", "out", wrap=(sys.executable, "-c", ignoring))
            server.await_requests(1)
            process.send_signal(signal.SIGHUP)
            process.send_signal(signal.SIGINT)
            self.finish(process, 0)

    def test_leaves_a_few_seconds_to_what_is_in_flight(self):
        """What has not come back by then is given up, and left to the next run."""
        self.write("in", rows(3))
        with self.serve(forever=lambda request: (
                reply_echo(request) if request.prompt == "p0" else stall())) as server:
            kill = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM))
            kill.start()
            with unittest.mock.patch.object(cometlimit, "_GRACE", 0.4):
                began = time.monotonic()
                self.cli("-i", "in", "-o", "out", expect=143)
            self.assertTrue(0.6 < time.monotonic() - began < 3.0)
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
                self.assertTrue(10 <= len(asked) <= 15, asked)
                self.assertGreater(max(asked), 20)  # some lie far on
                self.assertRegex(self.err, "stopped: rows of m fail alike: .*\n")
                os.unlink("out")

    def test_comes_not_for_rows_that_fail_in_a_heap(self):
        """What a filter refuses stands together: the others are answered, in the first run."""
        self.write("in", rows(60))
        flagged = lambda request: (  # noqa: E731
            status(403, "flagged") if int(request.prompt[1:]) < 30 else reply_echo(request))
        for source in (("-i", "in"), ("-i", "-")):
            with self.subTest(source=source), self.serve(forever=flagged):
                if source[1] == "in":
                    self.cli(*source, "-o", "out", expect=1)
                else:  # a pipe cannot be read ahead for ever
                    self.finish(self.start(*source, "-o", "out"), 1, stdin=self.read("in"))
                self.assertEqual([text for _, text in self.answers()],
                                 ["http_403"] * 30 + ["p%d" % n for n in range(30, 60)])
                os.unlink("out")

    def test_comes_to_one_model_alone(self):
        """A model that is gone keeps none of the others' rows from being answered: 1."""
        self.write("in", [dict(row, model="gone" if n < 30 else "here")
                          for n, row in enumerate(rows(60))])
        gone = status(404, self.NO[404])
        with self.serve(forever=lambda request: gone if request.body["model"] == "gone" else (
                reply_echo(request))) as server:
            self.cli("-i", "in", "-o", "out", expect=1)
            self.assertLess(len(server.requests), 50)
            self.assertEqual(sum(text[0] == "p" for _, text in self.answers()), 30)
            self.assertRegex(self.err, r"\b2\d left.*\n.*stopped: rows of gone")
            self.write("piped", [self.cli("-i", "in", "-o", "-", expect=1)])
            self.assertEqual(self.answers("piped")[-30:],
                             [("r%d" % n, "p%d" % n) for n in range(30, 60)])

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
            with unittest.mock.patch.multiple(cometlimit, _UNREACHED=0.5, _PLAIN=0.2):
                self.real_time()
                self.cli("--max-retries", "9", "-i", "in", "-o", "out", expect=3)
            self.assertRegex(self.err, "0/40 done, 0.0/s, no connection to %s\n" % place)
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

    def test_names_itself_in_errors(self):
        """Two lines at most, in the words of the command line and not of the library."""
        self.write("in", rows(1))
        for argv, words in ((("-c", "0"), "--max-concurrency is a"), (("--max-rate", "0"),
                            "--max-rate is a"), (("--max-retries", "-1"), "--max-retries is"),
                            (("--timeout", "nan"), "--timeout is a"),
                            (("--param", "timeout=5"), "see --help"),
                            (("--base-url", "http://example.org/v1"), "--allow-http"),
                            (("--ca-file", "no"), "--ca-file"), (("--header", "x"), "--header is"),
                            (("--header", "Host: x"), "Host"), (("--joblog", ""), "--joblog"),
                            (("--text", "-o", "out"), "--text"), (("-c", "x"), "-c")):
            with self.subTest(argv=argv), self.serve() as server:
                argv += ("--base-url", server.url.replace("http:", "https:")
                         ) if argv[0] == "--ca-file" else ()
                self.cli("-i", "in", *argv, expect=2)
                self.assertIn(words, self.err)
                self.assertNotRegex(self.err, r"max_|allow_|ca_file|Client|\w=\)")
                self.assertLessEqual(self.err.count("\n"), 2)

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
        """Whatever is wrong with the command is said before anything is sent or made."""
        self.write("in", rows(1))
        for argv in (("--timeout", "0"), ("--shard", "0/2"), ("--shard", "3/2"), ("--shard", "x"),
                     ("--param", "x"), ("--param", "=1"), ("--base-url", "x"),
                     ("--no-such",), ("-i", "missing"), ("-i", "."),
                     ("-o", "."), ("-o", "no/such/folder"), ("--joblog", "no/such"), ("prompt",),
                     ("-m", ""), ("-i", ""), ("-o", "")):
            with self.subTest(argv=argv), self.serve():
                self.cli("-i", "in", *argv, expect=2)
                self.assertIn("error: ", self.err)
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
        self.assertEqual(self.cli("--version").decode(),
                         "cometlimit %s\n" % cometlimit.__version__)
        text = self.cli("--help").decode()
        self.assertLessEqual(sum(1 + len(row) // 81 for row in text.splitlines()), 48)
        self.assertEqual(len(re.findall(r"^ +python3 cometlimit\.py ", text, re.M)), 3)

class TheDemo(CommandLine):

    def test_shows_it_all(self):
        """In a few seconds, without key or network, and plain in a pipe: a line a second."""
        out = self.finish(self.process, 0).decode()
        self.assertRegex(out, r"(?m)^2 s  \d+ answered, \d+ refused(  limit [5-9]\.?\d*/s)?$")
        self.assertRegex(out, r"(?s)\nmodel .*429 x [1-9].*\n40 answered, 0 lost, \d\.\d s\n$")
        self.assertNotRegex(out + self.err, "[\x1b\r]")


class TheScreen(CommandLine):

    def on_terminal(self, columns, server, *argv, expect=0, act=None):
        """What a run shows on a terminal of so many columns: a list of what was drawn, and the
        lines that stay."""
        import fcntl
        import pty
        import termios
        master, slave = pty.openpty()
        self.addCleanup(os.close, master)
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        process = self.start("-i", "in", "-o", "out", *argv, stdin=subprocess.DEVNULL,
                             stderr=slave)
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
        """Done, failed, the last failure, the rate, the time left, the limit; the less important
        parts give way on a narrow one; no server's words steer the terminal."""
        self.write("in", rows(20))

        def slow(request):
            time.sleep(0.06)
            n = int(request.prompt[1:])
            return reply_echo(request) if n % 5 else status(400, {
                "error": {"code": "\x1b[31mred", "message": "bad\x9b word"}})
        for columns, words in (
                (120, r"1\d/20 done, [1-4] failed, \d+\.\d/s, 0:00:0\d left, 400 \\x1b\[31mred"),
                (40, r"1\d/20 done, [1-4] failed, 400 \\x1b\[31mred$")):
            with self.subTest(columns=columns), self.serve(forever=slow) as server:
                drawn, stays = self.on_terminal(columns, server, "-c", "1", expect=1)
                self.assertTrue(3 <= len(drawn) <= 15, drawn)
                self.assertTrue(any(re.match(words, text) for text in drawn), drawn)
                self.assertRegex(stays, r"4 x \\x1b\[31mred \(r0, r5, r10, r15\): HTTP 400 ")
                self.assertLessEqual(max(map(len, stays.split("to go on")[0].split("\n"))), 100)
                self.assertNotRegex(stays + "".join(drawn), "[\x1b\x9b]")
                os.unlink("out")

    def test_says_at_once_that_it_stops(self):
        """After Ctrl-C: how many are in flight, and the seconds that they have."""
        self.write("in", rows(20))

        def stop(process):
            server.await_requests(4)
            process.send_signal(signal.SIGINT)
        with self.serve(forever=lambda request: time.sleep(0.8) or reply_echo(request)) as server:
            drawn, stays = self.on_terminal(80, server, "-c", "4", expect=130, act=stop)
        self.assertIn("stopping: 4 in flight, 5 s", drawn)
        self.assertRegex(stays, "4 answered, 0 failed, 0 kept, 16 left")

    def test_shows_the_last_minutes_rate_and_the_limit(self):
        """Not the mean since the start; refusals by chance are told."""
        options = types.SimpleNamespace(quiet=False, output_file="out")
        screen = cometlimit._Screen(options)
        stats = cometlimit.Stats()
        stats.rate, stats.requests, stats.chance = 9.76, 200, 6
        client = types.SimpleNamespace(metrics={("/v1", "m"): stats})
        screen.total, start = 5000, screen.began
        for second in range(0, 200, 10):
            screen.answers += 10 if second < 100 else 100
            text = screen._progress(client, start + second, 80)
        self.assertEqual(text, "1100/5000 done, 10.0/s, 0:06:30 left, limit 9.76/s, "
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
        self.assertIn("1 answers without text, 1 cut off by a length limit", text)
        self.assertLessEqual(max(map(len, self.err.split("tokens: ")[0].split("\n"))), 80)


class AChange(CommandLine):
    """Files are changed by others while a run goes on."""

    def run_and(self, act, expect, again=0, count=40):
        """A run of a second, during which act() is called; then another. Returns the requests."""
        self.write("in", [dict(row, prompt=row["prompt"].ljust(9000)) for row in rows(count)])
        acted = []

        def answer(request):
            if len(server.requests) == 6:
                acted.append(act())
            time.sleep(0.04)
            return reply(request.prompt.strip())
        with self.serve(forever=answer) as server:
            self.cli("-c", "4", "-i", "in", "-o", "out", expect=expect)
            self.first = self.err
            self.cli("-c", "4", "-i", "in", "-o", "out", expect=again)
            self.assertTrue(acted)
            return [request.prompt.strip() for request in server.requests]

    def test_of_an_input_that_grows_is_left_to_the_next_run(self):
        """Nothing is paid twice, and no crash."""
        def grow():
            with open("in", "ab") as file:
                file.write(line({"custom_id": "new", "prompt": "new"}))
        self.assertEqual(sorted(self.run_and(grow, 0)),
                         sorted(["new"] + ["p%d" % n for n in range(40)]))

    def test_of_an_input_that_is_cut_is_told(self):
        """What is in flight is written; 3, in words."""
        def cut():
            os.truncate("in", 0)
        self.run_and(cut, 3, again=2)
        self.assertIn("cut short", self.first)
        self.assertTrue(6 <= len(self.results()) <= 16)

    def test_of_the_output_loses_nothing(self):
        """Removed or replaced: written anew. Written to by another: told, and never 0."""
        def remove():
            os.unlink("out")

        def replace():
            self.write("other", [b"other\n"])
            os.replace("other", "out")
        for act in (remove, replace):
            with self.subTest(act=act):
                self.assertEqual(len(self.run_and(act, 0)), 40)
                self.assertEqual(self.answers(), [("r%d" % n, "p%d" % n) for n in range(40)])
                self.assertIn("was removed or replaced", self.first)
                os.unlink("out")

        def truncate():
            os.truncate("out", 0)
        self.run_and(truncate, 3)
        self.assertIn("another program has written to", self.first)
        self.assertEqual(len(self.answers()), 40)

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

    def test_of_settings_is_refused(self):
        """Another model, system message or field on the same output, or a row of version 1.0."""
        self.write("in", [{"custom_id": "a", "prompt": "x"}, {"custom_id": "b", "prompt": "y"}])
        with self.serve(forever=lambda request: (
                status(400) if request.prompt == "y" else reply_echo(request))):
            self.cli("--system", "s", "-i", "in", "-o", "out", expect=1)
        before = self.read("out")
        for argv in (("-m", "n", "--system", "s"), ("--system", "t"), (),
                     ("--system", "s", "--param", "n=1")):
            with self.subTest(argv=argv), self.serve():
                self.cli(*argv, "-i", "in", "-o", "out", expect=2)
                self.assertRegex(self.err, "'a' asked something else. Name another -o, or delete")
                self.assertEqual(self.read("out"), before)
        with self.serve(reply("y")):
            self.write("in", [{"custom_id": "a", "prompt": "x"}, {"custom_id": "b", "prompt": "z"}])
            self.cli("--system", "s", "-i", "in", "-o", "out")  # what failed may be mended
        self.write("out", [result("a", id="batch_req_0123456789abcdef"), result("b")])
        with self.serve():
            self.cli("-i", "in", "-o", "out", expect=2)

    def test_of_rows_that_failed_comes_last(self):
        """A resumed run asks new rows first, from a file and from a pipe."""
        self.write("in", rows(30))
        self.write("out", [result("r%d" % n, error={"code": "x", "message": "y"})
                           for n in range(10)])
        first = self.read("out")
        for argv in (("-i", "in"), ("-i", "-")):
            with self.serve(forever=reply_echo) as server:
                self.write("out", [first])
                self.finish(self.start("-c", "1", *argv, "-o", "out"), 0, stdin=self.read("in"))
                asked = [int(request.prompt[1:]) for request in server.requests]
            self.assertEqual(sorted(asked[-8:]), sorted(set(asked[-8:]) & set(range(10))))
            self.assertEqual(self.answers()[0], ("r0", "p0"))

    def test_of_the_file_system_needs_no_lock(self):
        """Where locks are not to be had: a warning, and on."""
        import fcntl
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
        with self.serve(forever=lambda request: (
                time.sleep(0.1 * (request.prompt == "p0")) or reply_echo(request))):
            self.cli("-i", "in", "-o", "out")
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
        for number, block in enumerate(self.blocks("python")):
            if "asyncio.run" in block and sys.version_info < (3, 7):
                continue
            with self.subTest(block=block):
                printed = self.run_block([sys.executable, "-W", "error", "-"], block)
                self.assertTrue(printed)
                if number == 0:
                    self.assertEqual(printed, shown)

    def test_shows_commands_that_run(self):
        """Each command runs as it stands, with this interpreter for python3."""
        os.mkdir("bin")
        os.symlink(sys.executable, "bin/python3")
        os.symlink(os.path.join(FOLDER, "cometlimit.py"), "cometlimit.py")
        self.write("requests.jsonl", rows(3))
        os.environ["PATH"] = os.path.abspath("bin") + os.pathsep + os.environ["PATH"]
        for block in self.blocks("sh"):
            if "--demo" not in block:  # which TheDemo runs
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

    def __init__(self, rate, burst=1.0):
        self.rate, self.burst, self.level, self.at = rate, burst, burst, 0.0

    def take(self, now):
        self.level = min(self.burst, self.level + (now - self.at) * self.rate)
        self.at = now
        taken = self.level >= 1.0 - 1e-9
        self.level -= taken
        return taken

    def end(self):
        pass


class Slots(Bucket):
    """A cap on requests in service."""

    def __init__(self, slots):
        self.free = slots

    def take(self, now):
        self.free -= 1
        if self.free < 0:
            self.free += 1
            return False
        return True

    def end(self):
        self.free += 1


def simulate(limiter, until, throttles=1, service=1.0, status=429, retry_after=None, travel=0.02):
    """Clients with endless work, each with a throttle of its own, share a limiter for a while.

    Returns the throttles, and for each the times at which its requests were taken and refused.
    """
    chance = random.Random(7)
    clients = [cometlimit.Throttle(random=chance.random) for _ in range(throttles)]
    taken, refused = [[] for _ in clients], [[] for _ in clients]
    events = [(0.001 * n, n, "look", n, None) for n in range(throttles)]
    order, looks = itertools.count(throttles), [0.0] * throttles
    while events and events[0][0] < until:
        now, _, what, n, ticket = heapq.heappop(events)
        throttle = clients[n]
        if what == "land":
            if limiter.take(now):
                taken[n].append(now)
                done = now + service * chance.uniform(0.3, 1.7)
                heapq.heappush(events, (done, next(order), "answered", n, ticket))
            else:
                refused[n].append(now)
                heapq.heappush(events, (now + travel, next(order), "refused", n, ticket))
            continue
        if what == "answered":
            limiter.end()
            throttle.answered(ticket, now)
        elif what == "refused":
            throttle.refused(ticket, now, status, retry_after)
        while throttle.wait(now) <= 1e-9:
            heapq.heappush(events, (now + travel, next(order), "land", n, throttle.sent(now)))
        due = now + throttle.wait(now)
        if looks[n] <= now or due < looks[n]:
            looks[n] = due
            heapq.heappush(events, (due, next(order), "look", n, None))
    return clients, taken, refused


class TheThrottle(unittest.TestCase):
    """The arithmetic, in virtual time: nothing sleeps."""

    def throttle(self, chance=0.5):
        return cometlimit.Throttle(random=lambda: chance)

    def congest(self, throttle, now, retry_after=None, status=429):
        ticket = throttle.sent(now)
        throttle.refused(ticket, now, status, retry_after)
        return ticket

    def test_lets_a_first_burst_leave_and_then_ever_more(self):
        """Before any refusal nothing is known: requests leave faster and faster."""
        throttle, now, gaps = self.throttle(), 0.0, []
        for _ in range(60):
            throttle.answered(throttle.sent(now), now)
            gaps.append(throttle.wait(now))
            now += gaps[-1]
        self.assertLess(gaps[0], 0.1)
        self.assertTrue(all(a > b for a, b in zip(gaps, gaps[1:])))
        self.assertIsNone(throttle.pace)

    def test_finds_the_rate_exactly(self):
        """Taken / time between two refusals is the rate, be it one in 20 s or 20 a second."""
        for rate, burst, delta in ((0.05, 1, 0.3), (0.5, 3, 0.12), (5, 5, 0.1), (20, 20, 0.1)):
            with self.subTest(rate=rate):
                (throttle,), _, _ = simulate(Bucket(rate, burst), max(25.0, 200 / rate))
                self.assertAlmostEqual(throttle.pace / rate, 1.0, delta=delta)

    def test_stays_near_the_limit_and_is_hardly_refused(self):
        """Of a bucket's grants nearly all are used, and few requests are refused."""
        for rate, refusals in ((0.5, 0.12), (5, 0.03), (20, 0.03)):
            with self.subTest(rate=rate):
                until = max(40.0, 300 / rate)
                _, (taken,), (refused,) = simulate(Bucket(rate, 5), until)
                self.assertGreater(len(taken), 0.78 * rate * until)
                self.assertLess(len(refused), refusals * len(taken))

    def test_obeys_retry_after_and_adds_chance(self):
        """Nothing leaves before the server's time, and not all at it; max_delay bounds it."""
        for asked, low, high in ((7.0, 7.0, 8.0), (0.5, 0.5, 1.0), (90.0, 30.0, 30.0)):
            for chance in (0.0, 1.0):
                with self.subTest(asked=asked, chance=chance):
                    throttle = self.throttle(chance)
                    self.congest(throttle, 10.0, asked)
                    self.assertTrue(low <= throttle.wait(10.0) <= high, throttle.wait(10.0))

    def test_waits_ever_longer_while_nothing_is_taken(self):
        """Each refusal without a request taken since the last lengthens the pause, to a bound."""
        throttle, now, pauses = self.throttle(), 0.0, []
        first = throttle.sent(now)
        throttle.refused(first, now + 0.1, 429, None)
        now = 0.1
        for _ in range(12):
            pauses.append(round(throttle.wait(now), 6))
            now += pauses[-1]
            ticket = throttle.sent(now)
            now += 0.1
            throttle.refused(ticket, now, 429, None)
        self.assertEqual(pauses, sorted(pauses))
        self.assertLess(2 * pauses[0], pauses[1])
        self.assertLessEqual(max(pauses), 30.0)
        self.assertGreater(pauses[-1], 5.0)

    def test_sends_one_probe_after_a_pause(self):
        """The first request after a pause goes alone until it could have been refused."""
        throttle = self.throttle()
        tickets = [throttle.sent(0.0) for _ in range(5)]
        throttle.refused(tickets[0], 0.2, 429, None)
        now = 0.2 + throttle.wait(0.2)
        throttle.sent(now)
        self.assertGreaterEqual(throttle.wait(now), 0.2)

    def test_ignores_stragglers(self):
        """Refusals of requests that left before the last congestion belong to it."""
        throttle = self.throttle()
        tickets = [throttle.sent(0.0) for _ in range(5)]
        throttle.refused(tickets[0], 0.1, 429, None)
        until, pace = throttle.until, throttle.pace
        for ticket in tickets[1:4]:
            throttle.refused(ticket, 0.11, 429, None)
        self.assertEqual((throttle.congestions, throttle.until, throttle.pace), (1, until, pace))
        throttle.refused(tickets[4], 0.12, 429, 9.0)  # all but a later Retry-After
        self.assertEqual((throttle.congestions, throttle.until), (1, 9.12))

    def test_finds_the_window_of_a_cap_on_concurrency(self):
        """Refused at the same number in flight again and again: a window, not a pace."""
        for slots in (1, 2, 8):
            with self.subTest(slots=slots):
                (throttle,), (taken,), (refused,) = simulate(Slots(slots), 100.0)
                self.assertGreater(len(taken), 0.75 * slots * 100 / 1.04)
                self.assertLess(len(refused), 0.12 * len(taken))

    def test_lets_shares_equal_out(self):
        """Clients that share a limit come to even shares, whoever came first."""
        _, taken, _ = simulate(Bucket(4, 4), 1000.0, throttles=4)
        shares = [sum(at > 250.0 for at in times) for times in taken]
        self.assertGreater(sum(shares) ** 2 / (4 * sum(n * n for n in shares)), 0.85)  # Jain's
        self.assertGreater(sum(map(len, taken)), 0.9 * 4 * 1000)

    def test_takes_failures_in_a_row_for_an_outage(self):
        """Then the door is shut, and nothing is learnt of the limit."""
        throttle = self.throttle()
        tickets = [throttle.sent(0.0) for _ in range(10)]
        for ticket in tickets[:3]:
            throttle.refused(ticket, 0.1, 503, None)
        self.assertLessEqual(throttle.until, 0.1)  # bad luck so far
        throttle.refused(tickets[3], 0.1, None, None)
        self.assertGreater(throttle.until, 0.1)
        self.assertEqual((throttle.congestions, throttle.pace), (0, None))

    def drive(self, throttle, count, takes, status=429, idle=None):
        """Asks as soon as may be, and is answered at once: the time after each request."""
        now = 0.0
        for number in range(count):
            now += throttle.wait(now) + (idle or {}).get(number, 0.0)
            ticket = throttle.sent(now)
            if takes(number, now):
                throttle.answered(ticket, now)
            else:
                throttle.refused(ticket, now, status, None)
            yield now

    def test_forgives_failures_at_random(self):
        """A failure now and then, each followed by an answer, holds nobody back."""
        *_, end = self.drive(self.throttle(), 200, lambda number, _: number % 5, status=500)
        self.assertLess(end, 6.0)

    def test_forgives_refusals_at_random(self):
        """Some servers refuse a few whatever the pace: that is no limit to sink to."""
        chance = random.Random(5)
        *_, end = self.drive(self.throttle(), 3000,
                             lambda number, _: number <= 100 or chance.random() >= 0.04)
        self.assertLess(end, 60.0)

    def test_forgets_a_measurement_that_was_chance(self):
        """A pace that has fallen time after time was no limit's: a new beginning."""
        throttle, limiter, paces, counts = self.throttle(), Bucket(3, 3), [], []
        for now in self.drive(throttle, 400, lambda number, now: (
                limiter.take(now) if number < 150 else number % 12)):
            paces.append(throttle.pace)
            counts.append(throttle.congestions)
        self.assertAlmostEqual(paces[149], 3.0, delta=0.2)
        self.assertIsNone(paces[-1])
        self.assertEqual(counts, sorted(counts))
        self.assertLess(now, 90.0)  # at that pace 130 s

    def test_soon_mends_a_first_rough_measurement(self):
        """Of few requests in little time the rate is not known well: it is soon measured again."""
        limiter = Bucket(4, 4)
        _, (taken,), (refused,) = simulate(limiter, 30.0, service=0.5, retry_after=1.0)
        self.assertGreater(len(taken), 0.85 * (4 * 30 + 4))
        self.assertLess(len(refused), 8)

    def test_keeps_its_pace_over_an_idle_hour(self):
        """Time in which nobody asked says nothing about the limit."""
        throttle, limiter = self.throttle(), Bucket(5, 5)
        paces = [throttle.pace for _ in self.drive(
            throttle, 900, lambda _, now: limiter.take(now), idle={500: 3600.0})]
        self.assertAlmostEqual(min(paces[500:]) / paces[499], 1.0, delta=0.2)

    def test_never_waits_longer_than_max_delay(self):
        """Whatever comes back, and in whatever order."""
        chance = random.Random(3)
        for _ in range(50):
            throttle, now, flying = cometlimit.Throttle(20.0, chance.random), 0.0, []
            for _ in range(200):
                now += chance.expovariate(1.0)
                if throttle.until <= now and throttle.wait(now) == 0.0:
                    flying.append(throttle.sent(now))
                elif flying:
                    ticket = flying.pop(chance.randrange(len(flying)))
                    if chance.random() < 0.5:
                        throttle.answered(ticket, now)
                    else:
                        throttle.refused(ticket, now, chance.choice([429, 503, None]),
                                         chance.choice([None, 0.1, 50.0, 1e9, math.inf]))
                self.assertLess(throttle.until - now, 20.001)


class Port(Server):
    """A server of anything: job(sock) has each connection to itself."""

    def __init__(self, job, tls=None):
        super().__init__(tls=tls)
        self.job = job

    def serve(self, sock, number):
        if self.tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate(self.tls))
            sock = self.own(context.wrap_socket(sock, server_side=True))
        with sock:
            self.job(sock)


def read_request(sock):
    """The bytes of one request, or what has come of it."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += sock.recv(1 << 16) or b"\r\n\r\n"
    head, _, body = data.partition(b"\r\n\r\n")
    size = int(head.lower().partition(b"content-length:")[2].split()[0]) if body else 0
    while len(body) < size:
        body += sock.recv(1 << 16)
    return head + b"\r\n\r\n" + body


def flood(start, piece, pause=0.0):
    """These bytes, then a piece after the other until the client hangs up."""
    def send(sock):
        sock.sendall(start)
        while True:
            sock.sendall(piece)
            time.sleep(pause)
    return Line(send)


def special(label, name, authority="ca", days=2, extensions=()):
    """A certificate that something is wrong with, as certificate(label) and Server(tls=label)."""
    certificate("ca")
    base, issuer = os.path.join(Certificates.folder, label + "1"), certificate("ca")
    if label != authority and authority != "ca":
        issuer = certificate(authority)
    with open(base + ".cnf", "w") as file:
        file.write("[req]\ndistinguished_name=dn\nprompt=no\n[dn]\nCN=%s\n[ext]\n%s" % (
            name, "\n".join(extensions or (
                "basicConstraints=critical,CA:FALSE", "subjectKeyIdentifier=hash",
                "authorityKeyIdentifier=keyid", "subjectAltName=IP:" + name))))
    signer = ("-signkey", base + ".key") if label == authority else (
        "-CAcreateserial", "-CA", issuer, "-CAkey", issuer)
    for words in (("req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
                   "-config", base + ".cnf", "-keyout", base + ".key", "-out", base + ".csr"),
                  ("x509", "-req", "-days", str(days), "-in", base + ".csr", "-out", base + ".crt",
                   "-extfile", base + ".cnf", "-extensions", "ext") + signer):
        subprocess.run(("openssl",) + words, check=True, stdout=subprocess.DEVNULL,
                       stderr=subprocess.DEVNULL, timeout=TIMEOUT)
    with open(base + ".pem", "w") as pem:
        for end in (".crt", ".key"):
            with open(base + end) as part:
                pem.write(part.read())
    return base + ".pem"


HEAD = b"HTTP/1.1 200 OK\r\n"
GOOD = json.dumps({"choices": [{"message": {"content": "all"}}]}).encode()
NOWFOLDER = types.SimpleNamespace(url="https://127.0.0.1:1/v1")
SCHEMES = (None, "127.0.0.1")  # as tls= of a Server


class Hostile(Case):
    """What the classes below share."""

    maxDiff = None

    def client(self, server, **options):
        if getattr(server, "tls", None):
            certificate(server.tls)  # now, not at the first handshake
            options.setdefault("ca_file", certificate("ca"))
        return super().client(server, **options)

    def outcome_at(self, client, prompt="Hi", **params):
        try:
            return client.complete(prompt, **params)
        except cometlimit.Error as error:
            return error


class AHostileAnswer(Hostile):
    """Costs at most its attempt: no hang, no crash, no memory, no wrong text."""

    def test_ends_at_the_timeout(self):
        """Whatever drips or floods, in whichever part, over http and https."""
        self.real_time()
        chunked = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
        early, header = b"HTTP/1.1 100 Continue\r\n\r\n", b"X: y\r\n"
        lines = [drip(part, 3.0) for part in ("status", "headers", "body", "chunks")] + [
            flood(b"", early, 0.02), flood(b"", early), flood(chunked + b"0\r\n", header, 0.02),
            flood(chunked + b"0\r\n", header), flood(HEAD, header, 0.02),
            flood(HEAD.replace(b"200 OK", b"503 No") + b"\r\n", b" ", 0.02)]
        for tls in SCHEMES:
            with Server(*lines, tls=tls) as server, self.client(
                    server, timeout=0.25, max_retries=0, max_concurrency=len(lines)) as client:
                for error in client.map(["Hi"] * len(lines), return_exceptions=True):
                    with self.subTest(tls=tls):
                        self.assertIsInstance(error, cometlimit.Error)
                        self.assertTrue(error.retryable, error)
                        self.assertLess(error.records[0].latency, 2.0)

    def test_is_no_answer_wherever_it_is_cut_off(self):
        """The end of the connection after any byte is a failure that may pass."""
        bodies = (HEAD + b"Content-Length: %d\r\n\r\n" % len(GOOD) + GOOD,
                  HEAD + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n%x\r\n%s\r\n0\r\n\r\n" % (
                      16, GOOD[:16], len(GOOD) - 16, GOOD[16:]))
        for tls, step in zip(SCHEMES, (1, 9)):
            for whole in bodies:
                cuts = range(0, len(whole), step)
                with Server(*[raw(whole[:cut]) for cut in cuts], tls=tls) as server:
                    with self.client(server, max_retries=0) as client:
                        for cut in cuts:
                            done = self.outcome_at(client)
                            if whole[:cut].count(GOOD[-9:]):  # only the framing's end is missing
                                self.assertEqual(getattr(done, "text", "all"), "all")
                                continue
                            with self.subTest(tls=tls, cut=whole[max(0, cut - 20):cut]):
                                self.assertIsInstance(done, (cometlimit.APIConnectionError,
                                                             cometlimit.APIResponseError))
                                self.assertTrue(done.retryable, repr(done))
                self.assertEqual(len(server.requests), len(cuts))

    def test_takes_no_more_memory_than_is_allowed(self):
        """A body too long is left unread, however it is framed; an error's sooner."""
        self.real_time()
        self.addCleanup(setattr, cometlimit, "_MAX_ANSWER", cometlimit._MAX_ANSWER)
        chunked = b"Transfer-Encoding: chunked\r\n\r\n"
        for code, most in ((b"400", cometlimit._MAX_ANSWER), (b"200", 1 << 18)):
            cometlimit._MAX_ANSWER = most
            for frame in (b"\r\n", b"Content-Length: 10000000000\r\n\r\n",
                          chunked + b"fffffffffffff\r\n", chunked + b"-70000\r\n") + (
                              (chunked + b"-1\r\n",) if code == b"200" else ()):
                start = b"HTTP/1.1 %s Any\r\n%s" % (code, frame)
                with Server(flood(start, b" " * (1 << 16))) as server:
                    with self.client(server, max_retries=0, timeout=0.7) as client:
                        tracemalloc.start()
                        try:
                            error = self.outcome_at(client)
                            peak = tracemalloc.get_traced_memory()[1]
                        finally:
                            tracemalloc.stop()
                with self.subTest(code=code, frame=frame):
                    self.assertIsInstance(error, cometlimit.Error)
                    self.assertLess(peak, 16 << 20)
                    if b"-" not in frame[:-2].split(b":")[-1]:
                        self.assertEqual((error.status_code, error.retryable), (int(code), False))

    def test_announces_more_than_comes(self):
        """A Content-Length of 10 ** 10 is not believed beforehand."""
        with Server(raw(HEAD + b"Content-Length: 10000000000\r\n\r\n[]"), reply("yes")) as server:
            self.assertEqual(self.client(server).complete("Hi").attempts, 2)

    def test_is_not_taken_for_another(self):
        """Odd heads end as a named Error or are understood; the next answer is the next's own."""
        named, answered = (cometlimit.APIConnectionError, True), "all"
        body = b"Content-Length: %d\r\n\r\n%s" % (len(GOOD), GOOD)
        for data, expected in (
                (b"SSH-2.0-OpenSSH_9.2\r\n", named), (b"\x00" * 300, named), (b"\r\n\r\n", named),
                (b"HTTP/1.1 abc OK\r\n" + body, named), (b"HTTP/1.1 1000 OK\r\n" + body, named),
                (b"HTTP/2 200\r\n" + body, named), (b"HTTP/1.1 200 " + b"x" * 70000, named),
                (HEAD + b"X: y\r\n" * 101 + body, named), (HEAD + b"X: " + b"y" * 70000, named),
                (HEAD + b"Content-Length: 5\r\n" + body, (cometlimit.APIResponseError, True)),
                (HEAD + b"X : 1\r\n" + body, answered), (HEAD + b"no colon\r\n" + body, answered),
                (HEAD + b"Content-Length: -5\r\n\r\n" + GOOD, answered),
                (HEAD + b"Content-Length: x\r\n\r\n" + GOOD, answered),
                (HEAD + b"\r\n" + GOOD, answered), (b"HTTP/1.1 200\r\n" + body, answered),
                (b"HTTP/1.1 100 Go\r\n\r\n" * 3 + HEAD + body, answered),
                (b"HTTP/1.1 103 Early\r\nLink: x\r\n\r\n" + HEAD + body,
                 (cometlimit.APIResponseError, True)),
                (b"HTTP/1.1 999 Any\r\n" + body, (cometlimit.APIStatusError, False)),
                (b"HTTP/1.1 204 No\r\n\r\n", (cometlimit.APIResponseError, True))):
            with self.subTest(data=data[:60]), Server(raw(data), reply("next")) as server:
                with self.client(server, max_retries=0) as client:
                    done = self.outcome_at(client)
                    self.assertEqual(getattr(done, "text", None) or (
                        type(done), done.retryable), expected)
                    self.assertEqual(client.ask("Hi"), "next")

    def test_may_be_any_json_or_none(self):
        """Byte order mark, half a surrogate, other encodings, long numbers: text or an Error."""
        long = b'{"choices": [{"message": {"content": "all"}}], "n": %s}'
        for body, expected in (
                (b"\xef\xbb\xbf" + GOOD, "all"), (GOOD.replace(b"all", b"\\ud800"), "\ud800"),
                (GOOD.decode().encode("utf-16"), None), (b"\x1f\x8b\x08" + GOOD, None),
                (GOOD.replace(b"all", b"\xff"), None), (long % b"NaN", None),
                (long % b"-Infinity", None), (long % (b"[" * 150 + b"]" * 150), "all"),
                (long % (b"[" * 300 + b"]" * 300), None), (b"[" * 100000, None),
                (b'{"a":' * 100000, None), (b"null", None), (b'"x"', None)):
            with self.subTest(body=body[:70]), Server(status(200, body)) as server:
                done = self.outcome_at(self.client(server, max_retries=0))
                self.assertEqual(getattr(done, "text", None), expected)
                if expected is None:
                    self.assertIs(type(done), cometlimit.APIResponseError)
        for digits in (5000, 1000000):  # int() takes the square of it, where nothing forbids it
            start = time.monotonic()
            with Server(status(200, long % (b"9" * digits))) as server:
                done = self.outcome_at(self.client(server, max_retries=0))
            with self.subTest(digits=digits):
                self.assertIsInstance(done, (cometlimit.Completion, cometlimit.APIResponseError))
                self.assertLess(time.monotonic() - start, 2.0)

    def test_does_not_overrun_a_small_stack(self):
        """Deep JSON, as an answer or an error, where threads have 1 MiB of stack."""
        deep = [status(code, text * 200000) for code in (200, 400) for text in ("[", '{"a":')]
        with Server(*deep) as server:
            done = run(server, "threading.stack_size(1 << 20)", """
                for n in range(4):
                    error = next(client.map(["Hi"], return_exceptions=True))
                    assert isinstance(error, cometlimit.Error), error""", "max_retries=0")
        self.assertEqual(done, (0, ""))


class AConnectionKept(Hostile):
    """Never gives a request another one's answer, and never sends it twice without need."""

    def test_drops_what_is_out_of_step(self):
        """Bytes after a body are never served as the next answer, whenever they come."""
        wrong = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (
            len(GOOD), GOOD.replace(b"all", b"BAD"))
        head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nX: " % len(GOOD)
        aligned = head + b"y" * (8192 - len(head) - 4 - len(GOOD)) + b"\r\n\r\n" + GOOD
        for tls in SCHEMES:
            for start, later in ((aligned, False), (aligned, True), (aligned[:-len(GOOD)].replace(
                    b"y" * 100, b"") + GOOD, False), (aligned, None)):
                sent = threading.Event()

                def send(sock):
                    sock.sendall(start + (b"" if later else wrong if later is False else b" "))
                    if later:
                        time.sleep(0.02)
                        sock.sendall(wrong)
                    sent.set()
                with Server(Line(send, keep=True), reply("next"), tls=tls) as server:
                    with self.client(server, max_retries=0) as client:
                        self.assertEqual(client.ask("Hi"), "all")
                        self.assertTrue(sent.wait(TIMEOUT))
                        time.sleep(0.01)
                        with self.subTest(tls=tls, size=len(start), later=later):
                            self.assertEqual(client.ask("Hi"), "next")

    def test_is_not_used_after_an_interim_answer(self):
        """After a 103 the real answer is still to come: not to the next request."""
        early = raw(b"HTTP/1.1 103 Early\r\n\r\n", keep=True)
        with Server(early, reply("next")) as server, self.client(server, max_retries=0) as client:
            self.assertIsInstance(self.outcome_at(client), cometlimit.Error)
            self.assertEqual(client.ask("Hi"), "next")
        self.assertEqual(server.connections, 2)

    def test_is_not_used_after_a_timeout(self):
        """An answer that comes too late is nobody's."""
        self.real_time()
        for tls in SCHEMES:
            late = threading.Event()

            def send(sock):
                late.wait(TIMEOUT)
                reply("late").send(sock)
            with self.subTest(tls=tls):
                with Server(Line(send, keep=True), reply("next"), tls=tls) as server:
                    client = self.client(server, max_retries=0, timeout=0.3)
                    error = self.outcome_at(client)
                    late.set()
                    self.assertIs(type(error), cometlimit.APITimeoutError)
                    self.assertEqual(client.ask("Hi"), "next")

    def test_that_the_server_closed_costs_nothing(self):
        """A server that closes after each answer sees each request exactly once."""
        for tls in SCHEMES:
            lines = [close_idle(reply(str(number))) for number in range(40)]
            with Server(*lines, tls=tls) as server:
                with self.client(server, max_retries=0) as client:
                    for number in range(40):
                        self.assertEqual(client.ask(str(number)), str(number))
                        time.sleep(0.005 * (number % 2))
            seen = [request.prompt for request in server.requests]
            self.assertEqual(seen, [str(number) for number in range(40)])

    def test_that_dies_is_replaced_once(self):
        """A request that a kept connection took along is sent once more, the same attempt."""
        def partly(sock):
            sock.sendall(HEAD)
            time.sleep(0.02)
            reset().send(sock)
        for tls in SCHEMES:
            for line in (hang_up(), reset()):
                with self.subTest(tls=tls, line=line):
                    with Server(reply("a"), line, reply("b"), tls=tls) as server:
                        with self.client(server, max_retries=0) as client:
                            client.ask("1")
                            self.assertEqual(client.complete("2").attempts, 1)
                    self.assertEqual([r.prompt for r in server.requests], ["1", "2", "2"])
                    with Server(reply("a"), line, line, tls=tls) as server:
                        with self.client(server, max_retries=0) as client:
                            client.ask("1")
                            error = self.outcome_at(client, "2")
                            self.assertIs(type(error), cometlimit.APIConnectionError)
                            self.assertTrue(error.retryable)
                    with Server(line, reply("b"), tls=tls) as server:
                        self.assertEqual(self.client(server).complete("1").attempts, 2)
                    with Server(reply("a"), Line(partly), tls=tls) as server:
                        with self.client(server, max_retries=0) as client:
                            client.ask("1")
                            self.outcome_at(client, "2")
                    self.assertEqual(len(server.requests), 2)

    def test_brings_an_early_refusal(self):
        """A 413 while the request is still going out is seen, not taken for a broken pipe."""
        def refuse(sock):
            sock.recv(1 << 16)
            status(413, {"error": {"message": "too big"}}, {"Connection": "close"}).send(sock)
            if kind == "waits":
                sock.settimeout(0.2)
                with contextlib.suppress(OSError):
                    while sock.recv(1 << 16):
                        pass
        for tls, kind in ((None, "closes"), (None, "waits"), ("127.0.0.1", "waits")):
            with self.subTest(tls=tls, kind=kind), Port(refuse, tls=tls) as server:
                with self.client(server) as client:
                    error = self.outcome_at(client, "x" * 3000000)
                self.assertEqual((error.status_code, server.connections), (413, 1), error)

    def test_is_kept_alive(self):
        """TCP keep-alive is on, so that a firewall does not forget it."""
        with Server(reply("yes")) as server, self.client(server) as client:
            client.ask("Hi")
            (wire,) = client._pool.wires
            for level, name in (("SOL_SOCKET", "SO_KEEPALIVE"), ("IPPROTO_TCP", "TCP_NODELAY")):
                self.assertTrue(wire.sock.getsockopt(getattr(socket, level), getattr(socket, name)))
            if hasattr(socket, "TCP_KEEPIDLE"):
                self.assertEqual(wire.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE), 30)

    def test_may_have_a_number_beyond_select(self):
        """A descriptor of 1024 or more is no hindrance."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        if hard != resource.RLIM_INFINITY and hard < 1200 or not hasattr(select, "poll"):
            self.skipTest("no 1200 descriptors are allowed here")
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 1200), hard))
        self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        with Server(reply("a"), reply("b")) as server, contextlib.ExitStack() as stack:
            for _ in range(1030):
                stack.callback(os.close, os.dup(2 if sys.stderr else server.listener.fileno()))
            with self.client(server, max_retries=0) as client:
                self.assertEqual([client.ask("Hi"), client.ask("Hi")], ["a", "b"])
                self.assertGreaterEqual(client._pool.wires[0].sock.fileno(), 1024)
            self.assertEqual(server.connections, 1)


class TheClock(Hostile):
    """Bounds what comes before the answer, too."""

    def addresses(self, *ports):
        """From now on "localhost" has these ports of 127.0.0.1 for addresses."""
        original = socket.getaddrinfo
        self.addCleanup(setattr, socket, "getaddrinfo", original)
        socket.getaddrinfo = lambda host, *rest, **options: [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)) for port in ports
        ] if host == "localhost" else original(host, *rest, **options)

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

    def test_bounds_all_addresses_together(self):
        """Four dead addresses take one timeout, and a living one behind them is reached."""
        self.real_time()
        with self.dead() as port, Server(reply("yes")) as server:
            url = server.url.replace("127.0.0.1", "localhost")
            self.addresses(port, port, port, server.port)
            client = self.client(server, base_url=url, max_retries=0, timeout=0.6)
            self.assertEqual(client.ask("Hi"), "yes")
            client.close()
            self.addresses(port, port, port, port)
            client = self.client(server, base_url=url, max_retries=0, timeout=0.3)
            start = time.monotonic()
            with self.assertRaisesRegex(cometlimit.APITimeoutError, "no connection in time"):
                client.ask("Hi")
            self.assertTrue(0.2 < time.monotonic() - start < 1.0)

    def test_bounds_a_handshake(self):
        """A server or proxy that says nothing, or drips, while the connection is made."""
        self.real_time()

        def silent(sock):
            sock.settimeout(3.0)
            while sock.recv(1 << 16):
                if piece:
                    for _ in range(100):
                        sock.sendall(piece)
                        time.sleep(0.02)
        for piece in (b"", b"H", b"HTTP/1.1 100 Go\r\n\r\n"):
            for proxied in (False, True):
                with self.subTest(piece=piece, proxied=proxied), Port(silent) as server:
                    if proxied:
                        os.environ["https_proxy"] = "127.0.0.1:%d" % server.port
                    start = time.monotonic()
                    error = self.outcome_at(self.client(
                        server, base_url="https://127.0.0.1:%d/v1" % server.port,
                        timeout=0.15, max_retries=0))
                    os.environ.pop("https_proxy", None)
                    self.assertIsInstance(error, cometlimit.APIConnectionError)
                    self.assertLess(time.monotonic() - start, 1.0)

    def test_bounds_an_upload(self):
        """A server that never reads ends at the timeout."""
        self.real_time()
        for tls in SCHEMES:
            gate = threading.Event()
            with self.subTest(tls=tls), Port(lambda sock: gate.wait(6.0), tls=tls) as server:
                start = time.monotonic()
                with self.assertRaisesRegex(cometlimit.APITimeoutError, "no answer in time"):
                    self.client(server, timeout=0.3, max_retries=0).ask("x" * 8000000)
                self.assertLess(time.monotonic() - start, 3.0)
                gate.set()

    def test_is_not_needed_by_close(self):
        """What is in a TLS handshake or in a proxy's hands is hung up on, too."""
        self.real_time()
        for proxied in (False, True):
            met, gone = threading.Event(), threading.Event()

            def silent(sock):
                sock.recv(1 << 16)
                met.set()
                with contextlib.suppress(OSError):
                    sock.recv(1 << 16)
                gone.set()
            with self.subTest(proxied=proxied), Port(silent) as server:
                if proxied:
                    os.environ["https_proxy"] = "127.0.0.1:%d" % server.port
                client = self.client(server, timeout=3.0,
                                     base_url="https://127.0.0.1:%d/v1" % server.port)
                call = client.submit("Hi")
                self.assertTrue(met.wait(TIMEOUT))
                time.sleep(0.05)
                client.close()
                self.assertIs(type(call.exception(TIMEOUT)), cometlimit.Error)
                self.assertTrue(gone.wait(1.0), "the connection is still there")


class Redirects(Hostile):
    """Are never followed."""

    def test_lead_nowhere(self):
        """Whatever the Location, and even with a completion for a body: one request, no more."""
        with Server() as other:
            for place in ("http://127.0.0.1:%d/v1", "http://localhost:%d/v1", "//127.0.0.1:%d/v1",
                          "ftp://127.0.0.1:%d/v1", "https://127.0.0.1:%d/", "/v1/other", "file:///",
                          "data:,x", "http://[::1", ""):
                place = place % other.port if "%" in place else place
                for code in (301, 302, 303, 307, 308):
                    line = status(code, GOOD, {"Location": place})
                    with self.subTest(code=code, place=place), Server(line) as server:
                        error = self.outcome_at(self.client(server))
                        self.assertIs(type(error), cometlimit.APIStatusError)
                        self.assertEqual((error.status_code, error.retryable, error.attempts,
                                          server.requests[0].method), (code, False, 1, "POST"))
        self.assertEqual(other.connections, 0)


class TheProxy(Hostile):
    """Is the environment's."""

    def use(self, scheme, proxy, user=""):
        os.environ[scheme + "_proxy"] = "http://%s127.0.0.1:%d" % (user, proxy.port)

    def test_gets_its_password_and_nothing_else(self):
        """The proxy does not see the key, nor the server the password."""
        for user, line in (("me:p%40ss@", "Basic bWU6cEBzcw=="), ("me@", "Basic bWU6"), ("", None),
                           ("me:\udcff@", "Basic bWU6/w==")):
            with self.subTest(user=user), Proxy() as proxy:
                with Server(reply("a"), reply("b"), tls="127.0.0.1") as server:
                    self.use("https", proxy, user)
                    with self.client(server) as client:
                        self.assertEqual([client.ask("Hi"), client.ask("Hi")], ["a", "b"])
                (head,) = proxy.heads
                self.assertTrue(head.startswith("CONNECT 127.0.0.1:%d HTTP/1.1\r\nHost: 127.0.0.1:"
                                                "%d\r\n" % (server.port, server.port)))
                self.assertEqual("Proxy-Authorization: %s\r\n" % line in head, line is not None)
                self.assertNotIn(KEY, head)
                for request in server.requests:
                    self.assertNotIn("proxy-authorization", request.headers)
                    self.assertEqual(request.headers["authorization"], "Bearer " + KEY)

    def test_cannot_answer_in_the_place_of_the_server(self):
        """What it sends in clear behind its own answer is never read as the server's."""
        fake = HEAD + b"Content-Length: %d\r\n\r\n%s" % (len(GOOD), GOOD)
        with Proxy(slip=fake) as proxy, Server(reply("real"), tls="127.0.0.1") as server:
            self.use("https", proxy)
            self.assertEqual(self.client(server).ask("Hi"), "real")

    def test_is_left_out_where_it_is_not_wanted(self):
        """NO_PROXY has its usual forms; an http proxy elsewhere never sees what is for here."""
        for no, direct in (("", 0), ("127.0.0.1", 1), ("*", 1), ("x, 127.0.0.1 ", 1), (".0.0.1", 1),
                           ("127.0.0.1:%d", 1), ("127.0.0.1:1", 0), ("127.0.0.0/8", 0), ("x", 0)):
            with self.subTest(no=no), Proxy() as proxy, Server(reply("yes")) as server:
                self.use("http", proxy)
                os.environ["no_proxy"] = no % server.port if "%" in no else no
                with self.client(server) as client:
                    self.assertEqual(client.ask("Hi"), "yes")
                self.assertEqual(len(proxy.heads), 1 - direct)
                self.assertEqual(["POST http://" in head for head in proxy.heads],
                                 [True] * len(proxy.heads))
        del os.environ["no_proxy"]
        with Server(reply("yes")) as server:
            os.environ["http_proxy"] = "http://192.0.2.1:3128"
            self.assertEqual(self.client(server).ask("Hi"), "yes")

    def test_is_chosen_when_the_client_is_made(self):
        """What the environment says later does not matter, and lower case wins."""
        with Proxy() as proxy, Server(reply("yes")) as server:
            client = self.client(server)
            self.use("http", proxy)
            self.assertEqual(client.ask("Hi"), "yes")
            os.environ.update(HTTP_PROXY=os.environ["http_proxy"], http_proxy="")
            self.assertIsNone(self.client(server)._endpoint.proxy)
            self.assertEqual(proxy.heads, [])

    def test_that_refuses_is_believed(self):
        """407, 403 and redirects are for good; 502, 503 and 504 may pass; garbage may, too."""
        for code, attempts in ((407, 1), (403, 1), (302, 1), (502, 3), (503, 3), (504, 3)):
            with self.subTest(code=code), Proxy(refuse=code) as proxy:
                self.use("https", proxy, "me:secret@")
                error = self.outcome_at(self.client(NOWFOLDER, max_retries=2))
                self.assert_error(error, cometlimit.APIConnectionError,
                                  "the proxy refuses: %d Any" % code, attempts=attempts)
                self.assertEqual(len(proxy.heads), attempts)
        for data in (b"nonsense\r\n\r\n", b"", b"HTTP/1.1 200 OK\r\n\r\nnonsense in place of TLS"):
            def answer(sock):
                read_request(sock)
                sock.sendall(data)
            with self.subTest(data=data), Port(answer) as proxy:
                self.use("https", proxy, "me:secret@")
                error = self.outcome_at(self.client(NOWFOLDER, max_retries=1))
                self.assertIs(type(error), cometlimit.APIConnectionError)
                self.assertNotIn("secret", str(error))

    def test_of_another_kind_is_refused(self):
        """A scheme that is not spoken is a ConfigurationError that shows no password."""
        for proxy in ("socks5://me:secret@h:1", "https://me:secret@h:1", "http://me:secret@",
                      "http://me:secret@h:x", "http://me:secret@h:70000", "me:secret@[::1"):
            os.environ["https_proxy"] = proxy
            with self.subTest(proxy=proxy):
                with self.assertRaisesRegex(cometlimit.ConfigurationError, "https_proxy cannot be "
                                            "used: only http://host:port can"):
                    try:
                        cometlimit.Client(api_key=KEY)
                    finally:
                        self.assertNotIn("secret", traceback.format_exc())


class TrustedCertificates(Hostile):
    """No other server gets the key."""

    def check(self, tls, words, **options):
        """A server that is not trusted sees one connection and no request."""
        with Server(tls=tls) as server:
            server.faults = collections_that_forget()
            error = self.outcome_at(self.client(server, **options))
            self.assertIs(type(error), cometlimit.APIConnectionError)
            self.assertEqual((error.attempts, error.retryable), (1, False))
            self.assertRegex(str(error), words)
            self.assertEqual((server.connections, server.requests), (1, []))

    def test_are_those_of_a_known_authority_for_this_host_and_time(self):
        """An unknown CA, another host, a past date: told with the remedy, once."""
        remedy = r"not trusted.*ca_file=, SSL_CERT_FILE or REQUESTS_CA_BUNDLE"
        certificate("localhost")
        special("expired", "127.0.0.1", days=0)
        special("self", "127.0.0.1", authority="self")
        special("other", "other", authority="other", extensions=(
            "basicConstraints=critical,CA:TRUE", "keyUsage=critical,keyCertSign",
            "subjectKeyIdentifier=hash"))
        for tls, options in (("localhost", {}), ("expired", {}), ("self", {}),
                             ("127.0.0.1", {"ca_file": certificate("other")}),
                             ("127.0.0.1", {"ca_file": None})):
            with self.subTest(tls=tls, **options):
                self.check(tls, remedy, **options)
        os.environ["SSL_CERT_FILE"] = "/no/file"
        self.check("127.0.0.1", remedy, ca_file=None)

    def test_are_demanded_whatever_the_program_did_to_the_defaults(self):
        """A tampered ssl._create_default_https_context has no effect."""
        original = ssl._create_default_https_context
        self.addCleanup(setattr, ssl, "_create_default_https_context", original)
        ssl._create_default_https_context = ssl._create_unverified_context
        self.check("127.0.0.1", "not trusted", ca_file=None)

    def test_may_be_named_in_many_ways(self):
        """By ca_file, a bundle of the environment or a directory of hashed names; ca_file wins."""
        authority = certificate("ca")
        folder = os.path.join(Certificates.folder, "hashed")
        name = subprocess.run(["openssl", "x509", "-hash", "-noout", "-in", authority],
                              stdout=subprocess.PIPE, check=True).stdout.decode().strip()
        os.makedirs(folder, exist_ok=True)
        shutil.copy(authority, os.path.join(folder, name + ".0"))
        for variables, option in (({"CURL_CA_BUNDLE": authority}, None), ({}, folder),
                                  ({"REQUESTS_CA_BUNDLE": folder}, None),
                                  ({"SSL_CERT_DIR": folder}, None),
                                  ({"REQUESTS_CA_BUNDLE": "/no/file"}, authority),
                                  ({"REQUESTS_CA_BUNDLE": authority,
                                    "CURL_CA_BUNDLE": "/no/file"}, None)):
            os.environ.update(variables)
            with self.subTest(option=option, **variables):
                with Server(reply("yes"), tls="127.0.0.1") as server:
                    self.assertEqual(self.client(server, ca_file=option).ask("Hi"), "yes")
            for name in variables:
                del os.environ[name]
        stats = cometlimit.Client(api_key=KEY)._endpoint.context.cert_store_stats()["x509_ca"]
        client = cometlimit.Client(api_key=KEY, ca_file=authority)
        self.assertEqual(client._endpoint.context.cert_store_stats()["x509_ca"], stats + 1)

    def test_that_cannot_be_loaded_are_named(self):
        """A missing or empty file is a ConfigurationError with its name and where it was said."""
        certificate("ca")
        empty = os.path.join(Certificates.folder, "empty.pem")
        open(empty, "w").close()
        for path in ("/no/file", empty):
            for name in ("ca_file", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
                with self.subTest(path=path, name=name):
                    options = {"ca_file": path} if name == "ca_file" else {}
                    os.environ.update({} if options else {name: path})
                    with self.assertRaisesRegex(cometlimit.ConfigurationError,
                                                "of %s .*%s" % (name, path)):
                        cometlimit.Client(api_key=KEY, **options)
                    os.environ.pop(name, None)
        os.environ["SSLKEYLOGFILE"] = "/no/folder/file"
        if sys.version_info >= (3, 8) and not sys.flags.ignore_environment:
            with self.assertRaisesRegex(cometlimit.ConfigurationError, "/no/folder/file"):
                cometlimit.Client(api_key=KEY)

    def test_without_key_usage_are_refused_with_a_remedy_where_python_does(self):
        """A CA of TLS inspection that is not strict: trusted, or told what is missing."""
        lax = special("lax", "lax", authority="lax", extensions=(
            "basicConstraints=CA:TRUE", "subjectKeyIdentifier=hash"))
        special("inspected", "127.0.0.1", authority="lax")
        strict = getattr(ssl, "VERIFY_X509_STRICT", 0)
        if ssl.create_default_context().verify_flags & strict:
            self.check("inspected", "Python 3.13 also demands of a CA.*key usage", ca_file=lax)
        else:
            with Server(reply("yes"), tls="inspected") as server:
                self.assertEqual(self.client(server, ca_file=lax).ask("Hi"), "yes")

    def test_do_not_help_an_old_protocol(self):
        """TLS 1.1 is refused, even where the system's OpenSSL would allow it."""
        certificate("ca"), certificate("127.0.0.1")
        original = ssl.create_default_context
        self.addCleanup(setattr, ssl, "create_default_context", original)

        def lax(context):
            context.set_ciphers("ALL:@SECLEVEL=0")
            if hasattr(ssl, "TLSVersion"):
                context.minimum_version = ssl.TLSVersion.TLSv1
            return context

        def serve(sock):
            with contextlib.suppress(OSError), old.wrap_socket(sock, server_side=True) as sock:
                spoken.append(sock.version())
        spoken = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the newest deprecate what is needed here
            old = lax(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
            old.load_cert_chain(certificate("127.0.0.1"))
            old.options |= ssl.OP_NO_TLSv1_2 | getattr(ssl, "OP_NO_TLSv1_3", 0)
            ssl.create_default_context = lambda: lax(original())
            with Port(serve) as server:
                error = self.outcome_at(self.client(
                    server, ca_file=certificate("ca"),
                    base_url="https://127.0.0.1:%d/v1" % server.port))
        self.assertEqual(spoken, [])
        self.assertEqual((type(error), error.retryable, error.attempts),
                         (cometlimit.APIConnectionError, False, 1), error)
        self.assertRegex(str(error), "TLS cannot be set up")

    def test_of_a_server_that_goes_away_may_come_later(self):
        """A hang-up or a reset during the handshake may pass; a server without TLS does not."""
        def serve(sock):
            sock.recv(1 << 16)
            line.send(sock)
        for line, attempts in ((hang_up(), 2), (reset(), 2), (raw(b"HTTP/1.1 400 No\r\n\r\n"), 1)):
            with self.subTest(attempts=attempts), Port(serve) as server:
                error = self.outcome_at(self.client(
                    server, base_url="https://127.0.0.1:%d/v1" % server.port, max_retries=1))
                self.assertIs(type(error), cometlimit.APIConnectionError)
                self.assertEqual((error.attempts, server.connections), (attempts, attempts), error)


def collections_that_forget():
    """A list that stays empty: a handshake that fails is no fault of the server's."""
    class Forgetful(list):
        def append(self, item):
            pass
    return Forgetful()


class TheKeyOnTheWire(Hostile):
    """Goes to the server alone."""

    def test_is_not_shown_by_debugging_aids(self):
        """Not by locals in a traceback, http.client's debug level or urllib's installed opener."""
        class Spy(urllib.request.BaseHandler):
            def http_request(self, request):
                seen.append(request)
                return request
        seen = []
        self.addCleanup(setattr, urllib.request, "_opener", None)
        urllib.request.install_opener(urllib.request.build_opener(Spy))
        connection = cometlimit.http.client.HTTPConnection
        self.addCleanup(setattr, connection, "debuglevel", 0)
        connection.debuglevel = 1
        with Server(status(401)) as server, open(os.devnull, "w") as nowhere:
            with contextlib.redirect_stdout(nowhere):
                nowhere.write = seen.append
                try:
                    self.client(server).ask("Hi")
                except cometlimit.Error as error:
                    shown = "".join(traceback.TracebackException(
                        type(error), error, error.__traceback__, capture_locals=True).format())
        self.assertNotIn(KEY, shown)
        self.assertEqual(seen, [])


SCRIPT = """\
import os, sys, threading
sys.path.insert(0, %r)
%s
import cometlimit
def main():
    client = cometlimit.Client(api_key=%r, base_url=%r, model="m", %s)
%s
main()
"""
ASK = '''    with client:
        if client.ask("\\xe9\\u2028 Hi") != "\\xe9\\u2028 Hi": sys.exit("wrong")'''


def start(server, before="", body=ASK, options="", flags=(), shell="exec \"$@\"", **popen):
    """A process that asks a server; its folder is not the module's."""
    body = "\n".join(line.replace(" " * 16, "    ", 1) for line in body.split("\n"))
    source = SCRIPT % (FOLDER, before, KEY, server.url, options, body)
    return subprocess.Popen(("sh", "-c", shell, "sh", sys.executable) + tuple(flags) + (
        "-c", source), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        **popen)


def end(process):
    """Its exit status and what it said on stderr."""
    with process:
        try:
            text = process.communicate(timeout=TIMEOUT)[1].decode()
        finally:
            process.kill()
    return process.returncode, text


def run(*args, **options):
    return end(start(*args, **options))


class LockedDownPlaces(Hostile):
    """Are where this runs."""

    def test_do_not_matter(self):
        """Flags, environment, closed streams, few descriptors, no folder, no file to write."""
        bare = {"env": {}}
        table = {
            "isolated": {"flags": ["-I", "-S", "-B"]}, "optimized": {"flags": ["-OO"]},
            "strict": {"flags": ["-W", "error"]}, "no environment": bare,
            "isolated, no environment": {"flags": ["-I", "-S", "-B"], "env": {}},
            "C": {"env": {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}},
            "no stdin": {"shell": 'exec "$@" <&-'}, "no stdout": {"shell": 'exec "$@" >&-'},
            "no streams": {"shell": 'exec "$@" <&- >&- 2>&-'},
            "64 descriptors": {"shell": 'ulimit -n 64; exec "$@"', "options": "max_concurrency=5"},
            "nothing to be written": {"shell": 'ulimit -f 0; exec "$@"'},
            "no home": {"shell": 'unset HOME; exec "$@"'}}
        table["no folder"] = {"flags": ["-I"], "before": "import tempfile\n"
                              "place = tempfile.mkdtemp()\n"
                              "os.chdir(place); os.rmdir(place)"}
        with Server(forever=reply_echo) as server:
            started = [(name, start(server, **words)) for name, words in table.items()]
            for name, process in started:
                with self.subTest(name=name):
                    self.assertEqual(end(process), (0, ""))
            self.assertEqual(len(server.requests), len(table))

    def test_may_know_no_such_user(self):
        """A user without a passwd entry, who may not even read Python's library any more."""
        if not hasattr(os, "geteuid") or os.geteuid() != 0:
            self.skipTest("only root can become somebody unknown")
        with Server(forever=reply_echo) as server:
            self.assertEqual(run(server, "import pwd", """
                sys.path[:] = []
                os.setgid(54321), os.setuid(54321)
                try: pwd.getpwuid(54321), sys.exit('known')
                except KeyError: pass
""" + ASK, env={}), (0, ""))

    def test_may_have_no_descriptor_left(self):
        """That is told with its remedies, not taken for a name unknown or a server's fault."""
        done = run(types.SimpleNamespace(url="https://localhost:1/v1"), "import resource", """
                resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))
                try:
                    while True: os.dup(2)
                except OSError: pass
                error = next(client.map(["Hi"], return_exceptions=True))
                if error.code != "no_socket" or error.overload or "ulimit -n" not in str(error):
                    sys.exit(repr(error))""", options="max_retries=0")
        self.assertEqual(done, (0, ""))

    def test_may_have_few_descriptors_left(self):
        """Those threads that get none leave the work to the others: nothing is lost."""
        with Server(forever=reply_echo) as server:
            self.assertEqual(run(server, "import resource", """
                resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))
                held = []
                try:
                    while True: held.append(os.dup(2))
                except OSError: pass
                for fd in held[:4]: os.close(fd)
                prompts = list(map(str, range(24)))
                texts = [done.text for done in client.map(prompts)]
                if texts != prompts: sys.exit(repr(texts))
                for fd in held[4:]: os.close(fd)
""", options="max_concurrency=12, max_delay=0.1"), (0, ""))

    def test_may_have_no_tls(self):
        """Without the ssl module https is a ConfigurationError, and http to this machine works."""
        with Server(forever=reply_echo) as server:
            self.assertEqual(run(server, "sys.modules['_ssl'] = None", ASK + """
                try: cometlimit.Client(api_key="k", model="m")
                except cometlimit.ConfigurationError as e: assert "ssl module" in str(e), e
                else: sys.exit("accepted")"""), (0, ""))

    def test_may_strip_the_command_line_of_its_docstrings(self):
        """The command line works under -OO, too."""
        for words in (["--version"], ["--help"]):
            done = subprocess.run([sys.executable, "-OO", cometlimit.__file__] + words,
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=TIMEOUT)
            self.assertEqual((done.returncode, done.stderr), (0, b""))


class Threads(Hostile):
    """May be few, and may call from anywhere."""

    def refuse_threads(self, allowed):
        original, _ = threading.Thread.start, self.addCleanup(
            setattr, threading.Thread, "start", threading.Thread.start)
        left = [allowed]

        def start(thread):
            if thread.name == "cometlimit":
                left[0] -= 1
                if left[0] < 0:
                    raise RuntimeError("can't start new thread")
            original(thread)
        threading.Thread.start = start

    def test_that_cannot_be_started_are_an_error(self):
        """Without any, submit raises it at once; with one, all is answered by that."""
        with Server(forever=reply_echo) as server:
            for allowed in (1, 0):
                self.refuse_threads(allowed)
                with self.client(server, max_concurrency=4) as client:
                    if allowed:
                        self.assertEqual([done.text for done in client.map(list("abcdefgh"))],
                                         list("abcdefgh"))
                        continue
                    for job in (lambda: client.ask("Hi"), lambda: list(client.map(["Hi"] * 9))):
                        with self.assertRaisesRegex(cometlimit.Error, "no thread can be started"):
                            job()

    def test_of_a_callback_do_not_wait_for_themselves(self):
        """To ask from a callback or from on_record is answered or refused, never a deadlock."""
        for place, ask in (("callback", lambda: client.ask("2")),
                           ("on_record", lambda: client.ask("2")),
                           ("callback", lambda: next(client.map(["2"])).text)):
            results, called = [], threading.Event()

            def again(_):
                if not called.is_set():
                    called.set()
                    try:
                        results.append(ask())
                    except Exception as error:
                        results.append(error)
            with self.subTest(place=place), Server(forever=reply_echo) as server:
                client = self.client(server, **{"on_record": again} if place != "callback" else {})
                call = client.submit("1")
                if place == "callback":
                    call.add_done_callback(again)
                end_at = time.monotonic() + 2.0
                while not results and time.monotonic() < end_at:
                    time.sleep(0.005)
                client.close()
                self.assertTrue(results and (results == ["2"] or isinstance(
                    results[0], cometlimit.ConfigurationError)), "a deadlock: %r" % results)

    def test_of_a_client_closed_in_a_callback_end(self):
        """close() from a callback or from on_record does not wait for its own thread."""
        for place in ("callback", "on_record"):
            closed = threading.Event()

            def close(_):
                client.close()
                closed.set()
            with self.subTest(place=place), Server(forever=reply_echo) as server:
                client = self.client(server, **{"on_record": close} if place != "callback" else {})
                call = client.submit("1")
                if place == "callback":
                    call.add_done_callback(close)
                self.assertTrue(closed.wait(TIMEOUT))

    def test_at_the_end_of_the_interpreter_do_no_harm(self):
        """What is asked in atexit is answered or refused by an Error; what hangs is left."""
        late = """
                import atexit
                def last():
                    try: assert client.ask("Hi") == "Hi"
                    except cometlimit.Error: pass
                atexit.register(last)"""
        hung = """
                client.submit("stall")"""
        with Server(forever=lambda request: stall() if request.prompt == "stall"
                    else reply_echo(request)) as server:
            processes = [start(server, body=body) for body in (late, hung)]
            for process in processes:
                with self.subTest():
                    self.assertEqual(end(process), (0, ""))

    @unittest.skipUnless(hasattr(os, "fork"), "there is no fork here")
    def test_of_a_fork_end_with_it(self):
        """A child that leaves its parent's with block, or submits at once, is not held."""
        with Server(forever=reply_echo, tls="127.0.0.1") as server:
            authority = certificate("ca")
            self.assertEqual(run(server, "import warnings; warnings.simplefilter('ignore')", """
                assert client.ask("a") == "a"
                with client:
                    held = client.submit("b")
                    child = os.fork()
                    if not child:
                        assert client.submit("c").result().text == "c"
                if child:
                    assert held.result().text == "b"
                    assert os.waitpid(child, 0)[1] == 0""", "ca_file=%r" % authority), (0, ""))
            self.assertEqual(sorted(request.prompt for request in server.requests), list("abc"))

    def test_of_two_clients_share_nothing(self):
        """Each has its own key, connection and limit."""
        with Server(forever=reply_echo) as one, Server(forever=reply_echo) as two:
            with self.client(one) as first, self.client(two, api_key="sk-other-key") as second:
                calls = [client.submit(str(n)) for n in range(20) for client in (first, second)]
                self.assertEqual([call.result().text for call in calls],
                                 [str(n) for n in range(20) for _ in range(2)])
                first.close()
                self.assertEqual(second.ask("on"), "on")
            for server, key, count in ((one, KEY, 20), (two, "sk-other-key", 21)):
                self.assertEqual({r.headers["authorization"] for r in server.requests},
                                 {"Bearer " + key})
                self.assertEqual((len(server.requests), server.connections), (count, 1))


class WhatFuzzingFound(CommandLine):
    """One input for each fault that random ones have found."""

    ROW = (b'{"id":"x","custom_id":"a","error":null,"response":'
           b'{"status_code":200,"body":{"x":1}}}')

    def test_by_bytes_after_an_answer(self):
        """They, and a chunk of -1 bytes, which is no leave to read for ever, end the connection."""
        for data, code in (
                (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}\r\n", 200),
                (b"HTTP/1.1 429 x\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n" + b"x" * 9999, 429)):
            ours, other = socket.socketpair()
            with self.subTest(data=data[:60]), ours, other:
                limit = unittest.mock.patch.object(cometlimit, "_MAX_ANSWER", 1000)
                wire = cometlimit._Wire(types.SimpleNamespace(head=b""))
                wire.sock, wire.expires = ours, cometlimit._now() + 1
                wire.reader = cometlimit._Reader(wire)
                other.sendall(data)
                with limit:
                    self.assertEqual(wire._exchange(b"").status, code)
                self.assertFalse(wire._is_quiet())

    def test_by_words_of_a_server(self):
        """Numbers and dates that only look like some; a byte order mark before an error."""
        hidden = {"message": "m", "code": "bad_response_status_code", "param": "\u00b2"}
        for line, retryable, retry_after in (
                (status(503, "", {"Retry-After": "Sun, 06 Nov 2094 1.2.3.4 GMT"}), True, None),
                (status(503, "", {"Retry-After": "1 \x1d"}), True, None),
                (status(500, {"error": hidden}), True, None),
                (status(503, b'\xef\xbb\xbf{"error":{"code":"model_not_found"}}'), False, None)):
            with self.subTest():
                error = self.outcome(line, max_retries=0)
                self.assertEqual((error.retryable, error.retry_after), (retryable, retry_after))

    def test_by_json_beyond_bounds(self):
        """Refused at once: what overflows, takes the square of its length, or nests too deep."""
        for text in ("[1e999]", "9" * 1000000, "[" * 4000000):
            with self.subTest(text=text[:9]), self.assertRaises(ValueError):
                cometlimit._parse(text)

    def test_by_files(self):
        """Another's file is left alone; a torn row, or a mark before the first one, is none."""
        for data, code in ((b'{"my":"config"}', 2), (b'{"id": "batch_req_0', 0),
                           (BOM + self.ROW + b"\n", 0)):
            with self.subTest(data=data), self.serve(forever=reply_echo):
                self.write("in", [{"custom_id": "a", "prompt": "p"}])
                self.write("out", [data])
                self.cli("-i", "in", "-o", "out", expect=code)
                self.assertEqual(self.read("out") == data, data != b'{"id": "batch_req_0')

    def test_by_addresses(self):
        """What is no URL is said to be none; a password need not be UTF-8."""
        for url in (123, b"https://x", "https://x\n/y"):
            with self.subTest(url=url), self.assertRaises(cometlimit.ConfigurationError):
                cometlimit.Client(api_key=KEY, base_url=url)
        os.environ["https_proxy"] = "http://u\udcff:p%ff@127.0.0.1:1"
        endpoint = cometlimit.Client(api_key=KEY, base_url="https://x")._endpoint
        self.assertIn(b"Basic df86cP8=\r\n", endpoint.connect)


if __name__ == "__main__":
    unittest.main()
