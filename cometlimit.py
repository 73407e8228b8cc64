# SPDX-License-Identifier: MIT
"""Ask a chat completions API many questions at once, at the rate its limit allows.

One file, standard library only, CPython 3.6 or newer on POSIX: copy it to your project.

    import cometlimit
    print(cometlimit.ask_all(["Say hello.", "Write a title."], model="your-model-id"))

    with cometlimit.Client(model="your-model-id", max_concurrency=5) as client:
        for done in client.map(prompts, return_exceptions=True):
            print(done)  # a Completion or an Error, in the prompts' order

What it promises (all times are in seconds):
  * Answers come in the order of the prompts, and none is lost.
  * Never more than max_concurrency requests are in flight, retries included.
  * The provider's limit is found and kept; refusals by chance are not taken for one.
  * What may pass is tried again, max_delay later at most; what cannot pass is not.
  * The key is shown nowhere, redirects are not followed, certificates are verified.
  * Every HTTP attempt leaves a Record; whatever waits can be interrupted.

    Error                      every failure of a prompt
    +-- ConfigurationError     a key, URL, prompt or parameter that cannot work
    +-- APIConnectionError     no whole answer: no connection, TLS, a cut-off body
    |   +-- APITimeoutError    no whole answer in time
    +-- APIStatusError         a status of failure
    |   +-- RateLimitError     429
    +-- APIResponseError       a 2xx answer that holds no completion

Version 2.0.0. Home: https://github.com/cometlimit/cometlimit
"""
import binascii
import bisect
import collections
import contextlib
import copy
import email.utils
import errno
import http.client
import io
import itertools
import json
import logging
import math
import os
import queue
import random
import re
import shlex
import signal
import socket
import sys
import textwrap
import threading
import time
import urllib.parse
import urllib.request
import zlib
from concurrent.futures import Future, wait
from concurrent.futures.thread import ThreadPoolExecutor  # now, while there are files
from typing import (Any, Callable, Deque, Dict, Iterable, Iterator, List, NamedTuple,
                    Optional, Set, Tuple, Type, Union)

try:
    import ssl
except ImportError:  # without OpenSSL, http to this machine still works
    ssl = None  # type: ignore[assignment]

__all__ = ["APIConnectionError", "APIResponseError", "APIStatusError",
           "APITimeoutError", "Client", "Completion", "ConfigurationError", "Error",
           "Metrics", "RateLimitError", "Record", "Throttle", "ask_all", "backoff",
           "main"]
__version__ = "2.0.0"

BASE_URL = "https://api.cometapi.com/v1"

_AHEAD = 16             # outcomes per place in flight that map() holds for a slow one
_LISTEN = 0.25          # seconds after which the main thread sees any signal
_CLOSING = 0.5          # seconds that close() waits for requests to be hung up on
_CONNECT = 15.0         # seconds: who has not answered a fourth SYN will not answer
_AFTER_DONE = 1.0       # seconds that a stream may go on after it has said [DONE]
_MAX_ANSWER = 64 << 20  # bytes; more than any completion, less than the memory
_MAX_ERROR = 64 << 10   # bytes; a gateway was seen to send an error of 114 MB
_SILENT = (408, 504, 524)  # what gateways answer where a request was silent too long
_DOUBT = 60.0           # seconds after an answer in which "no money" is not believed

_encode = json.JSONEncoder(allow_nan=False).encode
_log = logging.getLogger("cometlimit").log

Prompt = Union[str, List[Dict[str, Any]], Dict[str, Any]]

# Time and chance, which the tests replace.
_now, _wall, _random, _wait = (
    time.monotonic, time.time, random.random, threading.Condition.wait)


# Errors


class Error(Exception):
    """Every failure of a prompt. Its text has the server's words, if there are any.

    attempts, records: how many requests were made for the prompt, and a Record for each
    retryable: whether the same request may pass later; retry_after: in how many seconds
    status_code, request_id, body (JSON value or text, 64 KiB at most) of the answer
    code, type, param, message: what the server calls it
    """

    _code: Optional[str] = None

    def __init__(self, text: str, **details: Any) -> None:
        super().__init__(text)
        self.attempts, self.retryable = 0, False
        self.records: Tuple["Record", ...] = ()
        self.retry_after: Optional[float] = None
        self.status_code: Optional[int] = None
        self.request_id: Optional[str] = None
        self.code: Optional[str] = self._code
        self.type: Optional[str] = None
        self.param: Optional[str] = None
        self.message: Optional[str] = None
        self.body: Any = None
        self.__dict__.update(details)  # which are pickled along


class ConfigurationError(Error, ValueError):
    """A key, URL, prompt or parameter that cannot work. Nothing was sent."""
    _code = "invalid_request"


class APIConnectionError(Error):
    """No whole answer: no connection, no TLS, a reset, a cut-off body."""
    _code = "connection_error"


class APITimeoutError(APIConnectionError):
    """No whole answer in time. The server may have worked, and charge for it."""
    _code = "timeout"


class APIStatusError(Error):
    """The server answered with a status of failure."""


class RateLimitError(APIStatusError):
    """Status 429: too many requests or, with code insufficient_quota, no money."""


class APIResponseError(Error):
    """A 2xx answer without a completion: no JSON, no choices, an error in disguise."""
    _code = "invalid_response"


# Values


class Record(NamedTuple):
    """One HTTP attempt."""
    time: float               # when it left, as of time.time()
    route: str                # its path, such as /v1/chat/completions
    model: str                # as asked for
    status: Optional[int]     # None without an answer
    latency: float            # from connecting to the answer's last byte
    attempt: int              # 1 for the first
    waited: float             # before it, for its turn and in backoff
    request_id: Optional[str]
    error: Optional[str]      # a code such as timeout or rate_limit_exceeded
    prompt_tokens: int
    completion_tokens: int
    tag: Any                  # what submit() was given


class Completion(NamedTuple):
    """One answer."""
    text: str                 # empty where the model calls a tool or a filter struck
    model: str                # as returned: often a dated snapshot of the one asked for
    finish_reason: Optional[str]
    usage: Dict[str, Any]
    request_id: Optional[str]
    attempts: int
    latency: float            # of the last attempt
    body: Dict[str, Any]      # the whole answer


Outcome = Union[Completion, Error]


# The client


class Client:
    """An endpoint and the manner of calling it: a context manager, safe among threads.

    api_key          else COMETAPI_KEY; not needed over http, nor with an Authorization or
                     api-key in headers=
    base_url         else COMETAPI_BASE_URL, else CometAPI's; http only to this machine
    model            for prompts that name none
    max_concurrency  requests in flight at once, retries included
    max_rate         requests a second that are never exceeded, all models together
    max_retries      attempts after the first
    max_delay        the longest wait between two attempts, whatever Retry-After says
    timeout          for one attempt, from connecting to the last byte
    deadline         for one prompt with all its waits and attempts
    stream           None: ask for a stream where a gateway cuts silent connections off;
                     True: always; False: never. The Completion is the same
    check            called with each Completion: if it returns False or raises, the
                     prompt is asked again (error code: check_failed)
    headers          further HTTP headers, by name
    ca_file          CA certificates (PEM) to trust besides the system's, which else
                     REQUESTS_CA_BUNDLE or CURL_CA_BUNDLE name
    allow_http       http:// to any host: others can read the key on its way
    on_record        called with each Record, in the thread that made the attempt

    SSL_CERT_FILE and the *_proxy variables are obeyed. Leaving the `with` block waits
    for what was submitted; by an exception, or with close(), it does not. Raises
    ConfigurationError. Cannot be pickled: make one in each process.
    """

    def __init__(self, *, api_key: Optional[str] = None, base_url: Optional[str] = None,
                 model: Optional[str] = None, max_concurrency: int = 5,
                 max_rate: Optional[float] = None, max_retries: int = 4,
                 max_delay: float = 30.0, timeout: float = 600.0,
                 deadline: Optional[float] = None, stream: Optional[bool] = None,
                 check: Optional[Callable[[Completion], Any]] = None,
                 headers: Optional[Dict[str, str]] = None,
                 ca_file: Optional[str] = None, allow_http: bool = False,
                 on_record: Optional[Callable[[Record], Any]] = None) -> None:
        self.model, self.stream, self.check = model, stream, check
        self.max_concurrency, self.max_rate = max_concurrency, max_rate
        self.max_retries, self.max_delay = max_retries, max_delay
        self.timeout, self.deadline, self.on_record = timeout, deadline, on_record
        _check_options(self)
        self._endpoint = _Endpoint(api_key, base_url, headers, ca_file, allow_http)
        self.base_url = self._endpoint.base_url
        self._pools: Dict[int, _Pool] = {}

    def ask(self, prompt: Prompt, **params: Any) -> str:
        """The text of the answer to one prompt."""
        return self.complete(prompt, **params).text

    def complete(self, prompt: Prompt, **params: Any) -> Completion:
        """The answer to a prompt: a string (one user message), a list of messages, or a
        dict of body fields with "messages". `params` go into the request's body as they
        are: model=, temperature=, max_tokens= ...; the fields of a dict win over them.
        """
        self._pool.refuse_own_thread()
        future = self.submit(prompt, **params)
        try:
            done: Completion = _ended(future).result()
            return done
        finally:
            future.cancel()  # after Ctrl-C: nobody waits for it any more

    def submit(self, prompt: Prompt, *, tag: Any = None, **params: Any) -> Future:
        """complete() as a concurrent.futures.Future; `tag` goes into the Records.

        cancel() works until the outcome is there, and hangs up on what is in flight.
        """
        model, payload = _payload(prompt, dict({"model": self.model}, **params))
        return self._pool.submit(model, payload, tag)

    def map(self, prompts: Iterable[Prompt], *, return_exceptions: bool = False,
            **params: Any) -> Iterator[Any]:
        """The Completions of many (or endless) prompts, lazily and in their order.

        A prompt that fails raises its Error in its turn or, with return_exceptions,
        yields it. At most 2 x max_concurrency prompts without an outcome are taken
        ahead, and 16 x max_concurrency outcomes are held for a slow one before them.
        Leaving the loop early cancels what was not sent, and hangs up on what was.
        """
        self._pool.refuse_own_thread()
        ahead: Deque[Future] = collections.deque()
        most = _AHEAD * self.max_concurrency
        room = threading.Semaphore(2 * self.max_concurrency - 1)
        try:
            for future in self._futures(prompts, params):
                ahead.append(future)
                future.add_done_callback(lambda _: room.release())
                while not room.acquire(timeout=_LISTEN):
                    pass
                yield from _outcomes(ahead, most, return_exceptions)
            yield from _outcomes(ahead, 1, return_exceptions)
        finally:
            for future in ahead:
                future.cancel()

    @property
    def metrics(self) -> "Metrics":
        """What became of the requests so far: a snapshot."""
        with self._pool.lock:
            return copy.deepcopy(self._pool.metrics)

    def stop(self) -> None:
        """Send no more: what waits fails with an Error, what is in flight returns."""
        self._pool.stop("the client was stopped")

    def close(self) -> None:
        """End at once: what waits fails with an Error, what is in flight is cut off."""
        self._pool.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            if kind is None:
                self._pool.join()
        finally:
            self.close()

    def __repr__(self) -> str:
        return "<cometlimit.Client %s model=%r>" % (self.base_url, self.model)

    def __reduce__(self) -> Any:
        raise TypeError("a Client holds a key and sockets: make one in each process")

    @property
    def _pool(self) -> "_Pool":  # threads, locks and connections do not survive a fork
        pid = os.getpid()
        return self._pools.get(pid) or self._pools.setdefault(pid, _Pool(self))

    def _futures(self, prompts: Iterable[Prompt],
                 params: Dict[str, Any]) -> Iterator[Future]:
        """A Future for each prompt; a failed one if it is bad or `prompts` raises."""
        if isinstance(prompts, (str, bytes, dict)):
            raise ConfigurationError("prompts is a list; for one prompt there is ask()")
        source, ended = iter(prompts), False
        while not ended:
            try:
                yield self.submit(next(source), **params)
            except StopIteration:
                return
            except Exception as fault:
                failed: Future = Future()
                failed.set_exception(fault)
                yield failed
                ended = not isinstance(fault, Error)


def ask_all(prompts: Iterable[Prompt], *, return_exceptions: bool = False,
            **options_and_params: Any) -> List[Any]:
    """The texts of the answers, in the prompts' order.

    Client's options are taken by their names; all else goes into the requests' bodies.
    Raises the first Error or, with return_exceptions, has it in the place of a text.
    """
    options = {name: options_and_params.pop(name)
               for name in _OPTIONS & set(options_and_params)}
    with Client(**options) as client:
        outcomes = client.map(prompts, return_exceptions=return_exceptions,
                              **options_and_params)
        return [done if isinstance(done, Error) else done.text for done in outcomes]


_OPTIONS = frozenset(Client.__init__.__kwdefaults__ or ())


def _outcomes(ahead: "Deque[Future]", most: int,
              return_exceptions: bool) -> Iterator[Any]:
    """The first outcomes, as far as they are there; waits while `most` are ahead."""
    while ahead and (ahead[0].done() or len(ahead) >= most):
        error = _ended(ahead[0]).exception()
        if error is not None and not (return_exceptions and isinstance(error, Error)):
            raise error
        yield error or ahead[0].result()
        ahead.popleft()


def _ended(future: Future) -> Future:
    """The future, once it has ended. Ctrl-C does not wake the main thread if the system
    hands the signal to another thread, or does it just before the wait."""
    while not future.done():
        wait([future], _LISTEN)
    return future


# The loop


class _Call:
    """One prompt on its way to its outcome, with what its attempts came to so far."""

    def __init__(self, pool: "_Pool", model: "_Model", payload: bytes,
                 tag: Any) -> None:
        self.model, self.payload, self.tag = model, payload, tag
        self.future: Any = Future()  # pending to the end, so that it can be cancelled
        self.expires = _now() + (pool.client.deadline or math.inf)
        self.changed = threading.Condition(pool.lock)  # has its turn, or is given up
        self.given_up = ""           # why
        self.since = _now()          # when it began to wait
        self.place = (0, 0)          # among the calls that wait for their turn
        self.ticket: Any = None      # the throttle's, while in flight
        self.sent = 0                # its number among the model's requests
        self.refused = math.inf      # that number when it was last refused
        self.attempts = 0
        self.records: Tuple[Record, ...] = ()
        self.request: Optional[_Request] = None  # the last one
        self.stream = False          # it was cut off, so it asks for a stream


class _Model:
    """What is known of one model, and its calls that wait for their turn."""

    def __init__(self, name: str, client: Client) -> None:
        self.name = name
        # An executor each: calls of a model that is held back take no other's threads.
        # Twice as many threads as places: a call in backoff holds a thread as well.
        self.executor = ThreadPoolExecutor(2 * client.max_concurrency, "cometlimit")
        self.has_threads = False
        self.throttle = Throttle(client.max_delay, _random)
        self.waiting: List[Tuple[Tuple[int, int], _Call]] = []  # by their places
        self.sent = self.answered = 0       # requests; the latest with an answer
        self.answered_at = -math.inf        # when that came
        self.stream: Optional[bool] = None  # True: it needs streams; False: it has none
        self.stream_options = True          # False: it refuses this field


class _Pool:
    """What the calls of one process share. `lock` guards it, and the gate: nothing is
    sent and no callback runs while it is held."""

    def __init__(self, client: Client) -> None:
        self.client, self.endpoint = client, client._endpoint
        self.connections = _KeepAliveHandler(self.endpoint)
        self.opener = urllib.request.OpenerDirector()
        self.opener.add_handler(self.connections)
        self.lock = threading.Lock()
        self.ended = threading.Condition(self.lock)  # a call has its outcome
        self.calls: Dict[_Call, None] = {}           # those without
        self.models: Dict[str, _Model] = {}
        self.gate = _Gate(client, self.lock, self.models)
        self.metrics = Metrics()
        self.workers: Set[int] = set()               # threads that carry a call
        self.stopped = ""                            # why nothing more is sent

    def submit(self, name: str, payload: bytes, tag: Any) -> Future:
        with self.lock:
            if self.stopped:
                raise ConfigurationError("%s: make a new one" % self.stopped)
            model = self.models.get(name) or self.models.setdefault(
                name, _Model(name, self.client))
            call = _Call(self, model, payload, tag)
            call.place = (next(self.gate.numbers), 0)  # behind all others
            self.calls[call] = None
        future: Future = call.future
        future.add_done_callback(lambda future: self.give_up(
            [call], "nobody waits for it any more") if future.cancelled() else None)
        try:
            model.executor.submit(self._carry, call)
            model.has_threads = True
        except RuntimeError as fault:
            if not (model.has_threads and "new thread" in str(fault)):
                self.give_up([call], "no thread can be started to send it: %s" % fault)
                self.calls.pop(call, None)
                raise Error(call.given_up, code="no_thread") from None
        return future  # where no more threads can be started, one there is takes it

    def _carry(self, call: _Call) -> None:
        """The backoff loop: it carries a call from its first turn to its outcome.

        It waits for a turn, makes an attempt, learns, decides, backs off, and again.
        """
        outcome: Optional[Outcome] = None
        self.workers.add(threading.get_ident())
        while self.gate.turn(call):
            verdict = self._attempt(call)
            self._learn(call, verdict)
            outcome, pause = verdict.outcome, self._decide(call, verdict)
            if pause is None:
                break
            _tell(logging.INFO, "model %s: attempt %d of %d: %s; next in %.1f s",
                  call.model.name, call.attempts, self.client.max_retries + 1, outcome,
                  pause)
            self.gate.back_off(call, pause)
        self._finish(call, outcome or APITimeoutError("not sent before its deadline"))

    def _decide(self, call: _Call, verdict: "_Verdict") -> Optional[float]:
        """Seconds to the next attempt, at most max_delay; None: the outcome stands."""
        error, client, now = verdict.outcome, self.client, _now()
        if not isinstance(error, Error) or call.given_up or self.stopped:
            return None
        left, tries = client.max_retries + 1 - call.attempts, verdict.tries
        if self._adapt(call, error) and left > 0:
            return 0.0
        if (error.status_code == 429 and now < call.model.answered_at + _DOUBT
                and _speaks_of_money(str(error.code), str(error.type))):
            tries = math.inf  # some throttles say so for a second or two
        wish = error.retry_after or 0.0
        if wish > max(1, left) * client.max_delay:
            back = time.strftime("%H:%M", time.localtime(_wall() + wish))
            error.args = ("%s; come back at %s" % (error, back),)
            return None
        pause = backoff(call.attempts, wish, client.max_delay, _random)
        again = left > 0 and call.attempts < tries and now + pause < call.expires
        return pause if again else None

    def _adapt(self, call: _Call, error: Error) -> bool:
        """Choose the form of the next attempt; whether it may leave at once.

        A gateway cuts off what is silent for 100 s or so: the same request would never
        pass, a stream does. Some servers know no streams, or not their options.
        """
        model, free = call.model, self.client.stream is None
        streamed = call.request is not None and call.request.stream
        if error.status_code in _SILENT or error.code == "timeout":
            call.stream = free and model.stream is not False
        elif streamed and error.status_code in (400, 422):
            if model.stream_options and re.search(
                    "stream_options|include_usage", str(error)):
                model.stream_options = False
                return True
            if free and "stream" in str(error):
                call.stream = model.stream = False
                return True
        return False

    def _attempt(self, call: _Call) -> "_Verdict":
        """One HTTP exchange, whatever comes of it, and its Record."""
        client, model, endpoint = self.client, call.model, self.endpoint
        stream = client.stream
        if stream is None:
            stream = call.stream or bool(model.stream)
        request = _Request(endpoint, call.payload, stream, model.stream_options)
        request.sent_again = lambda fault: self._record(
            call, request, _translate(fault, request, endpoint).outcome)
        with self.lock:
            call.attempts += 1
            call.request, request.cut = request, bool(call.given_up)
        try:
            answer = _fetch(self.opener, request,
                            min(client.timeout, call.expires - request.began))
            verdict = _understand(answer, endpoint.hide, endpoint.url, stream)
            if request.fault is not None and isinstance(verdict.outcome, Error):
                raise request.fault
        except Exception as fault:  # whatever it is, somebody waits for the outcome
            verdict = _translate(fault, request, endpoint)
        if isinstance(verdict.outcome, Completion):
            verdict = _checked(client.check, verdict.outcome._replace(
                attempts=call.attempts, latency=_now() - request.began))
        self._record(call, request, verdict.outcome)
        return verdict

    def _record(self, call: _Call, request: "_Request", outcome: Outcome) -> None:
        code = _code(outcome) if isinstance(outcome, Error) else None
        usage = outcome.body.get("usage") if isinstance(outcome.body, dict) else None
        tokens = [count if isinstance(count, int) else 0 for count in map(
            (usage if isinstance(usage, dict) else {}).get,
            ("prompt_tokens", "completion_tokens"))]
        record = Record(
            request.wall, self.endpoint.route, call.model.name, request.status,
            _now() - request.began, call.attempts, request.began - call.since,
            outcome.request_id, code, tokens[0], tokens[1], call.tag)
        with self.lock:
            call.records += (record,)
            key = record.route, record.model
            self.metrics.setdefault(key, Stats()).count(record, outcome)
        _tell(logging.DEBUG, "%r", record)
        if self.client.on_record is not None:
            _run("on_record", self.client.on_record, record)

    def _learn(self, call: _Call, verdict: "_Verdict") -> None:
        """Free the place in flight, and tell the throttle what the attempt came to."""
        model, outcome, load = call.model, verdict.outcome, verdict.load
        throttle, known = model.throttle, model.throttle.congestions
        with self.lock:
            now = _now()
            if isinstance(outcome, Completion):
                model.answered, model.answered_at = max(model.answered, call.sent), now
                model.stream = call.stream or model.stream  # it needs what passed
            # Refused again, although later requests were answered: that is the prompt's
            # own fault, and says nothing about load.
            if load is None or call.given_up or call.refused < model.answered:
                throttle.answered(call.ticket, now)
            else:
                wish = outcome.retry_after if isinstance(outcome, Error) else None
                throttle.refused(call.ticket, now, load, wish)
            call.refused = call.refused if load is None else call.sent
            stats = self.metrics[self.endpoint.route, model.name]
            stats.rate, stats.window = throttle.rate, throttle.window
            stats.chance = throttle.chance
            self.gate.leave(call)
        if throttle.congestions > known:
            _tell(logging.INFO, "model %s: limit met: rate %.3g/s, window %s, a pause "
                  "of %.1f s", model.name, throttle.rate or math.nan, throttle.window,
                  max(0.0, throttle.until - now))

    def _finish(self, call: _Call, outcome: Outcome) -> None:
        """Hand the outcome over, which runs callbacks: never with the lock held."""
        finish: Callable[[Any], None] = call.future.set_result
        if call.given_up and not isinstance(outcome, Completion):
            outcome = Error("given up: " + call.given_up, code="cancelled")
        if isinstance(outcome, Error):
            outcome.attempts, outcome.records = call.attempts, call.records
            finish = call.future.set_exception
        if call.future.set_running_or_notify_cancel():
            _run("a callback", finish, outcome)
        call.future = call.request = None  # they refer to the call: all can be freed
        with self.lock:
            self.workers.discard(threading.get_ident())
            self.calls.pop(call, None)
            self.ended.notify_all()

    def refuse_own_thread(self) -> None:
        if threading.get_ident() in self.workers:
            raise ConfigurationError("a callback would wait for itself: use submit()")

    def give_up(self, calls: Iterable[_Call], why: str) -> None:
        """End calls: what waits fails, what is in flight is hung up on."""
        with self.lock:
            for call in calls:
                if call in self.calls and not call.given_up:
                    call.given_up = why
                    call.changed.notify()
                    if call.ticket is not None and call.request is not None:
                        call.request.hang_up()

    def stop(self, why: str) -> None:
        with self.lock:
            self.stopped = self.stopped or why
            waiting = [call for call in self.calls if call.ticket is None]
        self.give_up(waiting, why)

    def join(self) -> None:
        """Wait until every call has its outcome and its callbacks have run."""
        with self.lock:
            while self.calls:
                self.ended.wait(_LISTEN)

    def close(self) -> None:
        self.stop("the client was closed")
        self.give_up(list(self.calls), "the client was closed")
        for model in list(self.models.values()):
            model.executor.shutdown(wait=False)
        if threading.get_ident() not in self.workers:
            with self.lock:
                self.ended.wait_for(lambda: not self.calls, _CLOSING)
        self.connections.close()


def _checked(check: Optional[Callable[[Completion], Any]],
             completion: Completion) -> "_Verdict":
    """What the caller's own check makes of an answer."""
    try:
        if check is None or check(completion) is not False:
            return _Verdict(completion)
        why = "it returned False"
    except Exception as fault:
        why = "%s: %s" % (type(fault).__name__, fault)
    error = APIResponseError(
        "it did not pass the check: " + why, code="check_failed", status_code=200,
        retryable=True, request_id=completion.request_id, body=completion.body)
    return _Verdict(error, math.inf)


def _run(name: str, function: Callable[..., Any], value: Any) -> None:
    """Call what others wrote: if it fails, or exits, that must not cost an answer."""
    try:
        function(value)
    except BaseException:
        _tell(logging.ERROR, "%s failed", name, exc_info=True)


def _tell(level: int, *words: Any, **options: Any) -> None:
    with contextlib.suppress(BaseException):  # nor must a log handler that fails
        _log(level, *words, **options)


# The gate


class _Gate:
    """Whose turn it is: at most max_concurrency requests are in flight, the throttles
    and max_rate are kept, and who came first goes first. The pool's lock guards it.

    Of the calls that wait one, the watcher, looks at the clock: to wake them all for
    each request that may leave would cost more than the requests.
    """

    def __init__(self, client: Client, lock: threading.Lock,
                 models: Dict[str, _Model]) -> None:
        self.client, self.lock, self.models = client, lock, models
        self.numbers = itertools.count()
        self.entered = self.in_flight = 0  # the latest of the new calls that came here
        self.next_at = 0.0                 # nothing leaves before, for max_rate
        self.watcher: Optional[_Call] = None
        self.wakes_at = math.inf           # when the watcher looks again

    def turn(self, call: _Call) -> bool:
        """Wait until the call may be sent; False when it may not be any more."""
        waiting, entry = call.model.waiting, (call.place, call)
        with self.lock:
            self.entered = max(self.entered, call.place[0])
            bisect.insort(waiting, entry)
            while call.ticket is None and not call.given_up and _now() < call.expires:
                due = self._admit()
                if call.ticket is None:
                    self._await(call, due)
            if call.ticket is None:
                waiting.remove(entry)
            if self.watcher is call:
                self.watcher, self.wakes_at = None, math.inf
                self._look()
            return call.ticket is not None

    def leave(self, call: _Call) -> None:
        """Its attempt has ended. If it comes again it follows those that wait now."""
        call.ticket, call.since = None, _now()
        call.place = (self.entered, next(self.numbers))
        self.in_flight -= 1
        self._look()

    def back_off(self, call: _Call, pause: float) -> None:
        due = _now() + pause
        with self.lock:
            while not call.given_up and _now() < due:
                _wait(call.changed, due - _now())

    def _admit(self) -> float:
        """Give every turn that is due. Returns the seconds until the next may be;
        math.inf: not before an attempt has ended."""
        while self.in_flight < self.client.max_concurrency:
            now, first, due = _now(), None, math.inf
            for model in self.models.values():
                if model.waiting:
                    wait = max(model.throttle.wait(now), self.next_at - now)
                    if wait > 0.0:
                        due = min(due, wait)
                    elif first is None or model.waiting[0] < first.waiting[0]:
                        first = model
            if first is None:
                return due
            self._send(first.waiting.pop(0)[1], now)
        return math.inf

    def _send(self, call: _Call, now: float) -> None:
        model = call.model
        model.sent += 1
        call.sent, call.ticket = model.sent, model.throttle.sent(now)
        self.in_flight += 1
        if self.client.max_rate is not None:
            self.next_at = now + 1 / self.client.max_rate
        call.changed.notify()

    def _await(self, call: _Call, due: float) -> None:
        """Wait to be woken or, as the watcher, until something is due."""
        now = _now()
        seconds = call.expires - now
        if self.watcher in (None, call):
            self.watcher, self.wakes_at = call, now + due
            seconds = min(seconds, due)
        elif now + due < self.wakes_at:
            self.watcher.changed.notify()
        if seconds < math.inf:
            _wait(call.changed, seconds)
        else:
            call.changed.wait()

    def _look(self) -> None:
        """Give every turn that is due, and see that somebody watches for the others."""
        due = self._admit()
        if self.watcher is not None:
            if _now() + due < self.wakes_at:
                self.watcher.changed.notify()
        elif due < math.inf:
            first = next(model for model in self.models.values() if model.waiting)
            first.waiting[0][1].changed.notify()


# The throttle


def backoff(attempt: int, retry_after: Optional[float] = None, max_delay: float = 30.0,
            random: Callable[[], float] = random.random) -> float:
    """Seconds from attempt `attempt` (from 1) to the next one, at most max_delay.

    Doubles from 1 s, by chance 25 % less or more, so that those refused together do not
    return together. A Retry-After is a floor: chance adds to it, never takes from it.
    """
    base = min(max_delay / 1.25, 2.0 ** min(attempt - 1, 10))  # the longest varies too
    chance = random()
    delay = base * (0.75 + chance / 2)
    if retry_after is not None:
        delay = max(delay, retry_after + base * chance / 2)
    return min(delay, max_delay)


class Ticket(NamedTuple):
    number: int
    time: float     # when it left
    others: int     # in flight then


class Throttle:
    """Learns from what comes back when the next request may leave: it is pure.

    Before the first refusal the rate doubles each second. A refusal is a suspicion: a
    few requests leave at once to test it. An empty limiter refuses at least half of
    them, chance hardly ever, and chance changes nothing. A limit that was found
    - makes a pause; while nothing gets through, one probe at a time, and longer pauses;
    - measures the rate: the limiter was empty now and when the last limit was found, so
      it is requests taken / time. They leave a little slower, then ever faster;
    - is a cap if it is met twice at one number in flight, and hardly passed there: then
      a window holds instead of a rate, and Retry-After stops nobody.
    Tests cost refusals: where they find limits, all suspicions above the measured rate
    are believed without one, and half of the others.
    """
    START = 20.0        # requests/s at first: one leaves while a refusal comes back
    DIP = 0.97          # of the measured rate, to begin with: a bucket fills a little
    EVEN = 0.7          # growth ~ rate ** EVEN: under 1, so that small shares catch up
    GROWN = 25, 47.0    # requests, seconds in which the rate may double: a minute,
    ROUGH = 6.0         # or this many times the last stretch: a short one is inexact
    FALL = 0.65         # of the rate is kept by one measurement: it may be an outage
    SPARE = 0.7         # of what a limiter gains in a pause is used at once
    EXACT = 3, 2.0      # requests and seconds that make a measurement
    RARE = 0.01         # share of chance up to which two requests make a test
    PROVED = 4          # tests remembered: servers change their ways

    def __init__(self, max_delay: float = 30.0,
                 random: Callable[[], float] = random.random) -> None:
        self.max_delay, self.random = max_delay, random
        self.rate: Optional[float] = None       # requests/s, once measured
        self.window: Optional[int] = None       # most in flight, when capped
        self.congestions = self.chance = 0      # limits found; refusals by chance
        self.until = self._next = 0.0       # nothing leaves before: pause, rate
        self._count = self._flying = 0      # requests so far; in flight
        self._probe, self._alone = 0, 0.0   # first after the pause; seconds it is alone
        self._shut = 0.0                    # nothing has got through since
        self._ramp, self._double = self.START, 1.0  # first rate; growth takes so long
        self._empty, self._since = 0, 0.0   # the stretch's start: ticket, time
        self._lost = self._before = 0       # refused in it; before the suspicion
        self._suspect = Ticket(-1, 0.0, 0)  # the refusal under test
        self._test, self._due = range(0), 0.0   # its requests; news of them is in then
        self._hits = self._proved = 0       # refused meanwhile; tests that found limits
        self._cap = self._passed = 0        # in flight at the last limit; answered then

    def wait(self, now: float) -> float:
        """0.0: leave now; seconds to wait; math.inf: until one in flight has ended."""
        most = (self.window or math.inf) * (1 + self._growth(now))
        if self._flying > most - 1:
            return math.inf
        return min(self.max_delay, max(0.0, self.until - now, self._next - now))

    def sent(self, now: float) -> Ticket:
        """A request leaves; its ticket comes back in answered() or refused()."""
        if self._count == 0:
            self.until = self._shut = self._since = now
        gain = self.SPARE * (self.until - self._shut) - 1 / (self.rate or 1e-9)
        if self._count == self._probe:
            self._next, self.until = self.until - max(0.0, gain), now + self._alone
        idle = max(0.0, now - max(0.0, gain) - self._next)
        self._since += idle if self.rate else 0.0   # nobody asked: it measures nothing
        self._next += idle + (0.0 if self._count in self._test else self._interval(now))
        self._count, self._flying = self._count + 1, self._flying + 1
        return Ticket(self._count - 1, now, self._flying - 1)

    def answered(self, ticket: Ticket, now: float) -> None:
        """The server took it: any answer that says nothing about load."""
        self._flying -= 1
        self._passed += ticket.others >= self._cap

    def refused(self, ticket: Ticket, now: float, status: Optional[int],
                retry_after: Optional[float] = None) -> None:
        """It was turned away: the pattern decides what that means, not the status."""
        self._flying -= 1
        self._lost += ticket.number > self._empty
        told = min(self.max_delay, retry_after or 0.0)
        if ticket.number == self._probe and self.congestions:
            self._pause(ticket, now, told)
        elif ticket.number < self._probe:
            pass                            # the same congestion
        elif self.window is not None and ticket.others >= self.window:
            self._hold(ticket.others, now, 2 * self._double)    # try one more later
        elif self._is_limit(ticket, now):
            self._congested(ticket, now, told if self._proved > 1 else 0.0)

    def _is_limit(self, ticket: Ticket, now: float) -> bool:
        if self._test and (ticket.number < self._test.stop or ticket.time < self._due):
            self._hits += 1
            found = 2 * self._hits >= len(self._test)
            self._proved = min(self.PROVED, self._proved + found)
            return found
        if self._test:      # it has found nothing
            self.chance, self._proved = self.chance + 1 + self._hits, self._proved // 2
        above = self.rate is not None and 1 / self._interval(now) >= self.rate
        self._suspects(ticket, now)
        return self._proved > 1 and not self.window and (above or self.random() < 0.5)

    def _suspects(self, ticket: Ticket, now: float) -> None:
        self._suspect, self._before, self._hits = ticket, self._lost - 1, 0
        share = (self.chance + 0.5) / (self._count + 10)
        size = 2 + math.ceil(10 * (share - self.RARE))      # more where chance is more,
        size += (self._count - ticket.number - 1) // 2      # or more were in flight
        self._test = range(self._count, self._count + size)
        self._next, self._due = min(self._next, now), 2 * now - ticket.time

    def _congested(self, ticket: Ticket, now: float, told: float) -> None:
        others, self._test = self._suspect.others, range(0)
        self.congestions += 1
        self._pause(ticket, now, told)
        self._measure(self._suspect)
        capped = 0 < others == self._cap and self._passed <= 1
        self._cap, self._passed, self.window = others, 0, None
        if capped:
            self._hold(others, now, self._double)

    def _hold(self, window: int, now: float, double: float) -> None:
        self.window, self.rate, self._test = window, None, range(0)
        self._double = min(self.GROWN[1], double)
        self._probe, self._alone, self.until, self._shut = self._count, 0.0, now, now

    def _pause(self, ticket: Ticket, now: float, told: float) -> None:
        if ticket.number > self._probe:
            self._shut = now
        trip, shut = now - ticket.time, min(now - self._shut, self.max_delay / 4)
        pause = max(trip, shut, 1 / self.rate if self.rate else 0.5)
        chance = self.random() * pause / 2  # so that clients do not come back as one
        self.until = now + min(self.max_delay, (told or 0.75 * pause) + chance)
        self._probe, self._alone = self._count, min(2 * trip, self.until - now)

    def _measure(self, empty: Ticket) -> None:
        taken = empty.number - self._empty - 1 - self._before
        seconds = max(0.01, empty.time - self._since)
        if self.rate and (taken < self.EXACT[0] or seconds < self.EXACT[1]):
            return                          # the stretch goes on
        if self.congestions == 1:           # the bucket was full: half the ramp's rate
            self._ramp = 0.5 * (self._ramp + 0.69 * taken)
        elif taken >= 1:
            self.rate = max(taken / seconds, self.FALL * (self.rate or 0.0))
            self._double = min(self.GROWN[1], self.ROUGH * seconds)
        self._lost -= self._before + 1
        self._empty, self._since = empty.number, empty.time

    def _growth(self, now: float) -> float:     # 1: the limit may have doubled
        sent, passed = self._count - self._probe, max(0.0, now - self.until)
        return float(min(sent / self.GROWN[0], passed / self._double) ** 2)

    def _interval(self, now: float) -> float:
        if self.window is not None:
            return 0.0
        if self.rate is None:               # doubles each second: ln 2 = 0.69
            return 1 / (self._ramp + 0.69 * (self._count - self._probe))
        grown: float = self.rate ** self.EVEN * self._growth(now)
        return 1 / (self.DIP * self.rate + grown)


# Metrics


class Stats:
    """What became of the requests for one model on one route.

    requests, answers, retries, statuses (how many of each; None: no answer),
    prompt_tokens, completion_tokens, empty (answers without text or tool call), cut_off
    (by a length limit), chance (refusals that were not taken for a limit's); and what
    the throttle holds to now: rate (requests a second) and window (in flight), None
    while no limit was met.
    """

    rate: Optional[float] = None  # one client's present: these two do not add up
    window: Optional[int] = None

    def __init__(self) -> None:
        self.requests = self.answers = self.retries = self.chance = 0
        self.prompt_tokens = self.completion_tokens = self.empty = self.cut_off = 0
        self.statuses: Dict[Optional[int], int] = collections.Counter()
        # By steps of 5 %: quantiles of millions of answers in few numbers that add up.
        self.latencies: Dict[int, int] = collections.Counter()

    def latency(self, share: float) -> float:
        """What this share of the answers' latencies did not exceed (1.0: all), +-2.5 %."""
        left = share * self.answers - 1e-9
        for step in sorted(self.latencies):
            left -= self.latencies[step]
            if left <= 0.0:
                return float(1.05 ** step)
        return 0.0

    def count(self, record: Record, outcome: Union[Completion, Error]) -> None:
        self.requests += 1
        self.retries += record.attempt > 1
        self.statuses[record.status] += 1
        self.prompt_tokens += record.prompt_tokens
        self.completion_tokens += record.completion_tokens
        if isinstance(outcome, Completion):
            self.answers += 1
            self.latencies[round(math.log(max(record.latency, 1e-6), 1.05))] += 1
            self.empty += not outcome.text and outcome.finish_reason not in _CALLS
            self.cut_off += outcome.finish_reason == "length"

    def __add__(self, other: "Stats") -> "Stats":
        total = Stats()
        for name in vars(total):
            setattr(total, name, getattr(self, name) + getattr(other, name))
        return total


_CALLS = ("tool_calls", "function_call")  # of tools, which need no text


class Metrics(Dict[Tuple[str, str], Stats]):
    """Stats by (route, model). Two can be added up; str() is a table of 80 columns."""

    def __add__(self, other: "Metrics") -> "Metrics":
        return Metrics((key, self.get(key, Stats()) + other.get(key, Stats()))
                       for key in sorted(set(self) | set(other)))

    def __str__(self) -> str:
        form = "%-24s %8s %8s %7s %8s %8s %8s"
        lines = [form % ("model", "requests", "answers", "retries", "p50 s", "p95 s",
                         "max s")]
        for (_, model), stats in sorted(self.items()):
            if len(model) > 24:
                lines.append(model)
                model = ""
            lines.append(form % (model, stats.requests, stats.answers, stats.retries, *(
                "%.2f" % stats.latency(share) for share in (0.5, 0.95, 1.0))))
            lines += textwrap.wrap("tokens %d in, %d out; status %s%s" % (
                stats.prompt_tokens, stats.completion_tokens,
                ", ".join("%s x %d" % (status or "none", stats.statuses[status])
                          for status in sorted(stats.statuses, key=str)),
                "; %d refused by chance" % stats.chance if stats.chance else ""),
                80, initial_indent="  ", subsequent_indent="  ")
        return "\n".join(lines)


# The wire


class _Refused(OSError):
    """A proxy does not let us through: its status and reason."""


class _Request(urllib.request.Request):
    """The request of one attempt. hang_up() ends it from another thread."""

    def __init__(self, endpoint: "_Endpoint", payload: bytes, stream: bool,
                 stream_options: bool) -> None:
        if stream:
            options = b', "stream_options": {"include_usage": true}' * stream_options
            payload = payload[:-1] + b', "stream": true' + options + b"}"
        super().__init__(endpoint.url, payload, endpoint.headers, method="POST")
        for name, value in endpoint.secrets.items():
            self.add_unredirected_header(name, value)
        self.stream, self.payload = stream, payload
        self.sent_again: Callable[[BaseException], None] = lambda fault: None
        self.began, self.wall = _now(), _wall()
        self.expires = math.inf
        self.connection: Any = None
        self.status: Optional[int] = None       # of the answer
        self.fault: Optional[Exception] = None  # that ended its body early
        self.cut = False                        # hung up on

    def hang_up(self) -> None:
        self.cut = True
        if self.connection is not None:
            self.connection.hang_up()


def _fetch(opener: urllib.request.OpenerDirector, request: _Request,
           seconds: float) -> "_Answer":
    """Send a request and read its answer to the end, all within so many seconds."""
    response = opener.open(request, timeout=seconds)
    request.status, keep = response.status, False
    try:
        body = _read(response, request)
        # After a 1xx other than 100 the real answer is still to come.
        keep = (response.isclosed() and not response.will_close
                and response.status >= 200)
        cut = "" if request.fault is None else type(request.fault).__name__
        return _Answer(response.status, response.headers, body, cut)
    finally:
        request.connection.release(keep)


def _read(response: http.client.HTTPResponse, request: _Request) -> bytes:
    """The body as far as it comes: request.fault is what ended it early. Of one that
    is too long, more than is allowed."""
    good, body = 200 <= response.status < 300, bytearray()
    more = response.read1 if response.length is None else response.read
    try:
        for piece in iter(lambda: more(1 << 16), b""):  # never as much as is announced
            body += piece
            if len(body) > (_MAX_ANSWER if good else _MAX_ERROR):
                break
            # No line of JSON begins so; what follows may have come in the same piece.
            if re.search(rb"[\r\n]data: ?\[DONE\]", body[-len(piece) - 16:]):
                request.expires = min(request.expires, _now() + _AFTER_DONE)
        else:
            if response.length:  # read(n) does not tell: python/cpython#115997
                raise http.client.IncompleteRead(b"", response.length)
    except (OSError, http.client.HTTPException, ValueError) as fault:
        response.will_close = True
        if good:  # else the status says enough
            request.fault = fault
    return bytes(body)


class _KeepAliveHandler(urllib.request.BaseHandler):
    """Opens URLs on connections that are kept for the next request.

    urllib's own handler closes each, and a new TLS connection costs 26 ms of CPU. As
    the only handler of its opener it makes any status an answer, follows no redirect,
    and opens no file: or ftp:. urllib's ProxyHandler is not beside it, as that fails
    for a login without a password, and for one in bytes that are no UTF-8.
    """

    def __init__(self, endpoint: "_Endpoint") -> None:
        self.endpoint, self.closed = endpoint, False
        self.kept: Deque[_Connection] = collections.deque()

    def http_open(self, request: _Request) -> http.client.HTTPResponse:
        """The answer, whose body is still to be read.

        Where a kept connection turns out dead before any byte of an answer, the request
        is sent once more on a fresh one, as the same attempt. That the server read it
        and died cannot be excluded; browsers take the same risk.
        """
        request.expires = request.began + (request.timeout or 0.0)
        for connection in iter(self._take, None):
            if connection.is_quiet():
                try:
                    return connection.exchange(request)
                except OSError as fault:
                    if not _hung_up(fault) or connection.heard or request.cut:
                        raise
                    request.sent_again(fault)
                    request.began, request.wall = _now(), _wall()
                    break
        return _Connection(self.endpoint, self).exchange(request)

    https_open = http_open

    def _take(self) -> "Optional[_Connection]":
        try:
            return self.kept.pop()
        except IndexError:
            return None

    def close(self) -> None:
        self.closed = True
        for connection in iter(self._take, None):
            connection.close_socket()


class _Connection(io.RawIOBase):
    """A connection that is kept: a stream of answers. Its reads end with the attempt,
    while a socket's own time-out begins anew with each byte."""

    def __init__(self, endpoint: "_Endpoint", home: _KeepAliveHandler) -> None:
        self.endpoint, self.home = endpoint, home
        self.sock: Any = None
        self.reader: Any = None   # of what the socket brings
        self.request: Any = None  # the present one
        self.heard = 0            # bytes of its answer
        self.stands = False       # TCP and TLS do
        self.resolved = threading.Event()

    def exchange(self, request: _Request) -> http.client.HTTPResponse:
        """Send a request, and read the head of its answer."""
        self.request, self.heard, request.connection = request, 0, self
        try:
            if not self.stands:
                self._connect()
            self._refuse_cut()
            refused_early = not self._send(request)
            response = http.client.HTTPResponse(self.reader, method="POST")
            response.begin()
            response.will_close |= refused_early
            return response
        except BaseException:
            self.close_socket()
            raise

    def release(self, keep: bool) -> None:
        """The answer was read: keep the connection for another request, or close it."""
        self.request = None
        if keep:
            self.home.kept.append(self)
        if not keep or self.home.closed:
            self.close_socket()

    def hang_up(self) -> None:
        """End what goes on here, from another thread."""
        self.resolved.set()
        with contextlib.suppress(OSError, TypeError):  # there is no socket
            # SSLSocket's own would take the TLS state from under the thread that reads.
            socket.socket.shutdown(self.sock, socket.SHUT_RDWR)

    def close_socket(self) -> None:
        if self.sock is not None:
            self.sock.close()

    def is_quiet(self) -> bool:
        """Whether it is there and has brought nothing since its answer; else it is
        closed."""
        try:
            self.sock.settimeout(0.0)
            self.reader.peek(1)  # bytes that belong to no answer, or the end
        except (OSError, ValueError) as fault:
            if type(fault).__name__ in ("BlockingIOError", "SSLWantReadError"):
                return True
        self.close_socket()
        return False

    def arm(self) -> None:
        """Let the socket's next operation end with the attempt."""
        left = self.request.expires - _now()
        if left <= 0:
            raise socket.timeout("timed out")
        if abs((self.sock.gettimeout() or -1.0) - left) > 0.01:
            self.sock.settimeout(left)  # not each time: it is a system call

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self.heard > 2 * _MAX_ANSWER:  # http.client would read a chunk of -1 bytes
            raise ValueError("the answer is too long")
        if self.request is not None:
            self.arm()
        count: int = self.sock.recv_into(buffer)
        self.heard += count
        return count

    def _send(self, request: _Request) -> bool:
        """Send head and body in one write; whether the server listened to the end."""
        lines = ["POST %s HTTP/1.1" % self.endpoint.target, "Host: " + request.host]
        lines += ["%s: %s" % header for header in request.header_items()]
        lines.append("Content-Length: %d\r\n\r\n" % len(request.payload))
        self.arm()
        try:
            self.sock.sendall("\r\n".join(lines).encode() + request.payload)
        except OSError as fault:
            if not _hung_up(fault):
                raise
            return False  # a refusal, 413 say, may lie there; if not, reading fails too
        return True

    def _connect(self) -> None:
        endpoint = self.endpoint
        self._dial(*(endpoint.proxy or endpoint.address))
        self.reader = _Reader(self)
        if endpoint.connect:
            self.sock.sendall(endpoint.connect)
            response = http.client.HTTPResponse(self.reader, method="CONNECT")
            response.begin()
            if response.status != 200:
                raise _Refused(response.status, response.reason)
            self.reader = _Reader(self)  # what came in clear is no part of an answer
        if endpoint.context:
            self.arm()  # TLS in two steps, so that hang_up() finds the socket
            self.sock = endpoint.context.wrap_socket(
                self.sock, server_hostname=endpoint.address[0],
                do_handshake_on_connect=False)
            self.sock.do_handshake()
        self.stands = True

    def _refuse_cut(self) -> None:
        if self.request.cut:  # without a socket in use, so that none was shut down
            raise ConnectionAbortedError("hung up")

    def _dial(self, host: str, port: int) -> None:
        """Connect to the first address that answers, all of them within one bound."""
        end = min(self.request.expires, _now() + _CONNECT)
        places = self._addresses(host, port, end)
        for number, (family, kind, protocol, _, address) in enumerate(places):
            self._refuse_cut()
            self.sock = socket.socket(family, kind, protocol)
            self.sock.settimeout(max(0.001, (end - _now()) / (len(places) - number)))
            try:
                self.sock.connect(address)
                break
            except OSError:
                self.sock.close()
                if number == len(places) - 1:
                    raise
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_KEEPIDLE"):  # before a firewall forgets the connection
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30)
        self.arm()

    def _addresses(self, host: str, port: int, end: float) -> List[Any]:
        """getaddrinfo() in a thread of its own: it has no time limit, nor can it be
        woken."""
        socket.socket().close()  # without a descriptor left it would know no name
        found: List[Any] = []

        def look_up() -> None:
            try:
                found.extend(socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM))
            except Exception as fault:
                found.append(fault)
            self.resolved.set()
        try:
            threading.Thread(target=look_up, daemon=True).start()
        except RuntimeError:  # no more threads, or the interpreter's end
            look_up()
        if not self.resolved.wait(end - _now()) or not found:
            raise socket.timeout("timed out")
        if isinstance(found[0], Exception):
            raise found[0]
        return found


class _Reader(io.BufferedReader):
    """Lasts as long as its connection, so that what an answer left unread shows. An
    HTTPResponse takes it for a socket, and would flush and close it."""

    def makefile(self, _: str) -> "_Reader":
        return self

    def flush(self) -> None:
        pass

    close = flush


def _hung_up(fault: BaseException) -> bool:
    return (isinstance(fault, ConnectionError)
            or type(fault).__name__ in ("SSLEOFError", "SSLZeroReturnError")
            or "unexpected eof" in str(fault))  # for which 3.6 and 3.7 have no class


def _translate(fault: BaseException, request: _Request,
               endpoint: "_Endpoint") -> "_Verdict":
    """What an attempt without a whole answer comes to: here alone foreign exceptions
    become ours."""
    stands = request.connection is not None and request.connection.stands
    text = endpoint.hide("%s: %s" % (type(fault).__name__, fault))[:300]
    place = endpoint.place
    if isinstance(fault, socket.timeout):
        if not stands:
            return _passing("no connection to %s in time" % place, 504, math.inf,
                            APITimeoutError, "connect_timeout")
        return _passing("no answer from %s within %.3g s: raise timeout= (or deadline=) if"
                        " the model needs longer" % (place, request.timeout or 0.0), 504,
                        2, APITimeoutError, "timeout")
    if isinstance(fault, _Refused):
        words = "%s refuses: %d %s" % ((place,) + fault.args)
        if fault.args[0] == 407:
            words += (" (login for the proxy: http://user:password@host:port in "
                      "https_proxy)")
        return _passing(words, 503, math.inf if fault.args[0] in RETRYABLE else 1)
    if ssl and isinstance(fault, (ssl.SSLError, ssl.CertificateError)):
        words = _tls_words(text)
        if words or not (stands or _hung_up(fault)):
            return _passing((words or "no TLS with %s. " % place) + text, None, 1)
    if isinstance(fault, OSError) and fault.errno in (errno.EMFILE, errno.ENFILE):
        return _passing("no more files or connections may be open at once: lower max_"
                        "concurrency, or raise the limit (ulimit -n). " + text, None,
                        code="no_socket")
    if isinstance(fault, (OSError, http.client.HTTPException, ValueError)):
        return _passing("no whole answer from %s. %s" % (place, text) if stands else
                        "no connection to %s. %s%s" % (place, text, endpoint.hint), 503)
    return _Verdict(Error("unexpected " + text, code="unexpected"))


def _passing(words: str, load: Optional[int], tries: float = math.inf,
             kind: Type[Error] = APIConnectionError,
             code: str = "connection_error") -> "_Verdict":
    return _Verdict(kind(words, code=code, retryable=tries > 1), tries,
                    load if tries > 1 else None)


def _tls_words(text: str) -> str:
    """What a user can do about a fault of TLS, where that is known."""
    if "CERTIFICATE_VERIFY_FAILED" in text or text.startswith("CertificateError"):
        return ("the server's certificate is not trusted. Where the network inspects "
                "TLS, give its CA as ca_file=, SSL_CERT_FILE or REQUESTS_CA_BUNDLE "
                "(Python 3.13 also demands a CA that states its key usage). ")
    # As words where Python has no name for the alert: 3.6 with TLS 1.3.
    if re.search("(?i)alert.(bad.|no.)?certificate|alert.handshake.failure", text):
        return "the server refuses us: it may demand a certificate of the client. "
    return ""


# Reading answers


# Codes of an error that say that there is no money, as billing_... do; 1113 is Zhipu's.
MONEY = frozenset("""
    1113 arrearage credit_balance_exhausted exceeded_current_quota_error
    insufficient_balance insufficient_funds insufficient_quota insufficient_user_quota
    pre_consume_token_quota_failed quota_exceeded""".split())
_NO_MODEL = frozenset({"model_not_found", "unsupported_model"})
# What no repetition cures: CometAPI answers an unknown model with 503 and a malformed
# request with 500. Compared with both the code and the type of an error. With 429 only
# the two above count: some call a rate limit an invalid_request_error.
PERMANENT = MONEY | _NO_MODEL | frozenset("""
    access_denied access_terminated authentication_error content_filter
    content_policy_violation context_length_exceeded convert_request_failed
    count_token_failed gen_relay_info_failed invalid_api_key invalid_request
    invalid_request_error missing_required_parameter model_price_error
    permission_denied permission_error prompt_blocked
    sensitive_words_detected""".split())
# The statuses that codes of MiniMax's base_resp stand for; its other codes may pass.
_MINIMAX = {"1002": 429, "1039": 429, "1004": 401, "2049": 401, "1008": 402,
            "1026": 400, "1027": 400, "2013": 400}
_SUCCESS = ("", "0", "200", "none", "ok", "success")  # codes that tell of no failure
# CometAPI documents 429, 500, 503, 504 and 524 as passing, Groq 498; gateways answer the
# others for the same reasons.
RETRYABLE = frozenset({408, 429, 498, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529})
_MAX_DEPTH = 200        # json recurses in C: a hostile answer could overrun a stack
_MAX_WISH = 31 * 86400  # seconds: whoever asks to wait longer means something else
_MIN_SECRET = 6         # a shorter key is a placeholder such as "none", a common word
_SLICE = 1 << 16        # bytes that are decompressed at once
_MAX_MEMBERS = 1000     # of a gzip body: each costs time, even an empty one
_MAX_EVENTS = 1 << 20   # of a stream, likewise
_TOO_LONG = "more than %d MiB" % (_MAX_ANSWER >> 20)
_WORDS = {"code": ("code", "error_code", "status_code"), "type": ("type",),
          "param": ("param",), "message": ("message", "msg", "status_msg", "error_msg")}
_STREAM = re.compile("(data|event|id|retry)?:")         # how server-sent events begin
_PIECES = ("delta", "logprobs", "text")                 # what a stream sends in pieces,
_ONCE = ("role", "id", "type", "name", "format")        # these in it again and again
_NUMBER = r"[0-9]{1,15}(?:\.[0-9]{1,15})?"
_SPAN = (r"(%s)\s*(milliseconds?|ms|s(?:ec(?:ond)?s?)?|m(?:in(?:ute)?s?)?"
         r"|h(?:(?:ou)?rs?)?|d(?:ays?)?)(?![a-z])" % _NUMBER)
_ASKED = re.compile(  # "try again in 7m12s", "retryDelay": "37s", "retry_after_ms": 350
    r"(?i)(?:try again|retry|(?<![a-z])wait|(?<!connection )reset|estimated_time"
    r"|available(?: again)? in)((?:[\s\"'`\\:={(~*_-]|\\n|again|after|delay|in|for|at"
    r"|least|about|approximately|another|time|your|this|the|request|milli|second|ms|s)"
    r"{0,30})(?<!-)(?:((?:%s[\s,]*(?:and\s+)?)+)|(%s)(?![\w:/-]))" % (_SPAN, _NUMBER))


class _Answer(NamedTuple):
    """What came back for a request."""
    status: int
    headers: http.client.HTTPMessage
    body: bytes    # longer than _MAX_ANSWER: there is more, which was not read
    cut: str = ""  # why the body ended before its end; "" when it is whole


class _Verdict(NamedTuple):
    """What an attempt came to."""
    outcome: Union[Completion, Error]
    tries: float = 1  # attempts in all that a call may make while it fails like this
    load: Optional[int] = None  # a refusal's status, where it says something about load


def _understand(answer: _Answer, hide: Callable[[str], str], url: str,
                streamed: bool = True) -> _Verdict:
    """The Completion that an answer holds, or the Error that it stands for.

    What came whole is paid for, so it is read if it can be read. `hide` takes the key
    out of the server's words; `url` is what was asked, `streamed` whether for a stream.
    """
    text, missing = _text(answer)
    data = text if missing == _TOO_LONG else _value(text, streamed)
    if 200 <= answer.status < 300 and not _trouble(data):
        with contextlib.suppress(LookupError, TypeError, AttributeError):
            return _Verdict(_completion(data, hide(_request_id(answer)) or None))
    return _failure(answer, text, missing, data, hide, url)


def _completion(data: Any, request_id: Optional[str]) -> Completion:
    """Raises LookupError, TypeError or AttributeError where there is none."""
    choice, usage = data["choices"][0], data.get("usage")
    message = choice["message"] if "message" in choice else {"content": choice["text"]}
    text, reason = message.get("content"), choice.get("finish_reason")
    if isinstance(text, list):  # of parts, as some gateways have it
        text = "".join(str(part.get("text") or "") for part in text
                       if isinstance(part, dict))
    return Completion(
        text if isinstance(text, str) else "", str(data.get("model") or ""),
        reason if isinstance(reason, str) else None,
        usage if isinstance(usage, dict) else {}, request_id, 1, 0.0, data)


def _trouble(data: Any) -> Any:
    """The part of a 2xx answer that tells of a failure, if one does."""
    if not isinstance(data, dict):
        return None
    choices, base = data.get("choices"), data.get("base_resp")
    code = base.get("status_code") if isinstance(base, dict) else data.get("code")
    if data.get("error") or not choices and str(code or "").lower() not in _SUCCESS:
        return data
    for choice in choices if isinstance(choices, list) else ():
        if isinstance(choice, dict) and (
                choice.get("error") or choice.get("finish_reason") == "error"):
            return {"error": choice.get("error") or "finish_reason is error"}
    return None


def _failure(answer: _Answer, text: str, missing: str, data: Any,
             hide: Callable[[str], str], url: str) -> _Verdict:
    """The Error for an answer that is no completion, and whether it may pass."""
    trouble = data if answer.status >= 300 else _trouble(data)
    words = {name: hide(word)[:2000] for name, word in _words(trouble).items()}
    body = hide(text[:_MAX_ERROR])[:_MAX_ERROR - 1024]  # no part of a key at its end
    what = words.get("message") or " ".join(body[:200].split())
    kind: Any = RateLimitError if answer.status == 429 else APIStatusError
    tries, load = _again(_status(answer, words, trouble), words)
    if answer.status < 300:
        kind = APIResponseError
        if trouble is None:
            tries, load, form = _no_answer(answer, text, missing, data)
            what = hide(form.format(url=url, why=missing, said=what))
    elif answer.status < 400:
        place = re.match(r"(?:https?:)?//([\w.:-]{1,200})",
                         answer.headers.get("location", ""))
        what = hide("a redirect%s, which is not followed: check the base URL" % (
            " to " + place.group(1) if place else ""))
    hint = answer.headers.get("x-should-retry", "")
    tries = {"true": math.inf, "false": 1}.get(hint, tries)
    wish = _wish(answer.headers, str(trouble)[:_MAX_ERROR])
    return _Verdict(kind(
        "HTTP %s: %s" % (("%d %s" % (answer.status, words.get("code", ""))).rstrip(),
                         what or "an empty body"),
        status_code=answer.status, body=_loosely(body), retryable=tries > 1,
        retry_after=wish or None if tries > 1 or answer.status == 429 else None,
        request_id=hide(_request_id(answer, words.get("message", ""))) or None,
        **words), tries, load if tries > 1 else None)


def _no_answer(answer: _Answer, text: str, missing: str,
               data: Any) -> Tuple[float, Optional[int], str]:
    """The verdict on a 2xx with neither a completion nor an error, and its words."""
    page = "html" in answer.headers.get("content-type", "").lower() or text[:1] == "<"
    for holds, tries, form in (
            (missing == _TOO_LONG, 1, "an answer of {why}"),
            (not text, math.inf, "an empty body"),
            (_STREAM.match(text), math.inf, "a stream without a finish_reason: {said}"),
            (isinstance(data, dict), 2, "an answer without choices: {said}"),
            (isinstance(data, str) and missing, math.inf, "cut off ({why}): {said}"),
            (page, 1, "a web page came from {url}: check the base URL "
                      "(is /v1 missing?): {said}")):
        if holds:
            return tries, None, form
    return 1, None, "{said}"


def _status(answer: _Answer, words: Dict[str, str], trouble: Any) -> Optional[int]:
    """The status that a failure stands for; None for a 2xx that does not say."""
    code = words.get("code", "")
    status = None if answer.status < 300 else answer.status
    if status:  # the upstream's own may stand in `param`, hidden by the gateway
        code = words.get("param", "") if code == "bad_response_status_code" else ""
    elif isinstance(trouble, dict) and "base_resp" in trouble:
        return _MINIMAX.get(code)
    elif re.search("(?i)rate_?limit|too_?many_?requests", code + words.get("type", "")):
        status = 429
    return int(code) if re.match("[1-5][0-9][0-9]$", code) else status


def _again(status: Optional[int], words: Dict[str, str]) -> Tuple[float, Optional[int]]:
    """How many attempts a failure deserves, and the load that it shows."""
    named = {words.get(name, "").lower() for name in ("code", "type")}
    lasting = named & (_NO_MODEL if status == 429 else PERMANENT)
    if lasting or _speaks_of_money(*named) or (
            status == 429 and _is_too_large(words.get("message", ""))):
        return 1, None
    if status is None or status == 408:  # which says that one request was slow
        return math.inf, None
    return (math.inf, status) if status in RETRYABLE else (1, None)


def _speaks_of_money(*names: str) -> bool:
    return any(name.lower() in MONEY or name.lower().startswith("billing_")
               for name in names)


def _is_too_large(message: str) -> bool:
    """Whether a request exceeds the limit itself: then it never passes."""
    limit, requested = [
        [int(re.sub(r"\D", "", number)) for number in re.findall(
            r"(?i)\b%s\W{1,3}([0-9]{1,15}(?:[,._'][0-9]{3}){0,5})" % name, message)[:1]]
        for name in ("limit", "requested")]
    if limit and requested:
        return requested > limit
    return bool(re.search("(?i)request too large|reduce the length|maximum context",
                          message))


def _words(body: Any) -> Dict[str, str]:
    """The code, type, param and message of a failure, wherever gateways put them."""
    layers = [] if isinstance(body, str) else _layers(body)
    found: Dict[str, str] = {}
    for name, spellings in _WORDS.items():
        order = layers[::-1] if name == "message" else layers[1:] + layers[:1]
        for value in (layer.get(spelling) for layer in order for spelling in spellings):
            if type(value) in (str, int, float) and value != "":
                found.setdefault(name, str(value))
    return found


def _layers(value: Any) -> List[Dict[str, Any]]:
    """The objects in which an error lies, one within the other, be it as a text."""
    layers: List[Dict[str, Any]] = []
    for _ in range(9):
        if isinstance(value, list) and value:
            value = value[0]
        if isinstance(value, str):
            inner = _loosely(value[value.find("{"):]) if "{" in value else value
            if isinstance(inner, str):
                code = {"code": value} if re.match(r"[a-z]+(_[a-z]+)+$", value) else {}
                beside = layers and layers[-1].get("message")
                return layers + [code if beside else dict(code, message=value)]
            value = inner
        if not isinstance(value, dict):
            break
        layers.append(value)
        value = _within(value)
    return layers


def _within(value: Dict[str, Any]) -> Any:
    """What tells more of an error than the object around it."""
    for name in ("error", "errors", "detail", "base_resp"):
        if value.get(name):
            return value[name]
    if isinstance(value.get("loc"), list):  # FastAPI's
        return "%s: %s" % (".".join(map(str, value["loc"])), value.get("msg"))
    metadata, message = value.get("metadata"), value.get("message")
    if isinstance(message, dict) or "{" in str(message):
        return message
    raw = metadata.get("raw") if isinstance(metadata, dict) else None  # OpenRouter's
    return {"message": raw} if isinstance(raw, str) else raw


def _request_id(answer: _Answer, message: str = "") -> str:
    """To quote to the provider. Chained gateways each add theirs: the last is ours."""
    names = ("x-request-id", "x-cometapi-request-id", "x-oneapi-request-id",
             "request-id")
    return next(filter(None, map(answer.headers.get, names)), None) or "".join(
        re.findall(r"\(request id: ([^)\s]{1,200})\)", message)[-1:])


def _wish(headers: http.client.HTTPMessage, said: str) -> float:
    """The seconds that a server asks to wait, the longest of several; 0.0 for none.

    Gateways drop headers but hand bodies on: the error's words count as much.
    """
    waits = [_retry_after(headers)]
    for found in _ASKED.finditer(said):
        spans, number = found.group(2), float(found.group(5) or 0)
        if spans:
            number = sum(float(count) * _seconds(unit) for count, unit in re.findall(
                "(?i)" + _SPAN, spans))
        elif re.search("(?i)ms|milli", found.group(1)):
            number *= 0.001
        if spans or number > 1e9 or re.search("(?i)after|delay|time|sec|ms",
                                              found.group()):
            waits.append(_from_now(number, headers))
    return max(waits)


def _seconds(unit: str) -> float:
    if re.match("(?i)ms|mil", unit):
        return 0.001
    return {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}[unit[0].lower()]


def _retry_after(headers: http.client.HTTPMessage) -> float:
    """retry-after-ms, else Retry-After as of RFC 9110, 10.2.3: seconds, or one of three
    forms of date; else what LiteLLM was told."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0),
                       ("llm_provider-retry-after", 1.0)):
        waits = [0.0]
        for value in headers.get_all(name, ()):  # float() would take 1_0 and inf
            number = re.match(r"[ \t]*([0-9]+(?:\.[0-9]*)?)[ \t]*\Z", value)
            waits.append(_from_now(float(number.group(1)) * unit if number
                                   else _timestamp(value), headers))
        if max(waits) > 0.0:
            return max(waits)
    return 0.0


def _from_now(seconds: float, headers: http.client.HTTPMessage) -> float:
    """A large number is a time of Unix, in seconds or milliseconds, to be counted from
    the answer's own Date since clocks differ. 0.0 for what cannot be meant."""
    if seconds > 1e9:
        seconds /= 1000.0 if seconds > 1e12 else 1.0
        seconds -= _timestamp(headers.get("date", "")) or _wall()
    return seconds if 0.0 < seconds <= _MAX_WISH else 0.0


def _timestamp(date: str) -> float:
    """The time of an HTTP date, 0.0 for anything else."""
    try:  # parsedate_to_datetime takes asctime's form, without a zone, for local time
        parts = email.utils.parsedate_tz(date)
        return float(email.utils.mktime_tz(parts)) if parts else 0.0
    except (ValueError, OverflowError, LookupError, TypeError, NameError):  # by a bug
        return 0.0


def _text(answer: _Answer) -> Tuple[str, str]:
    """A body as text, without its compression, and why it is not whole, or ""."""
    most = _MAX_ANSWER if 200 <= answer.status < 300 else _MAX_ERROR
    data, missing = answer.body, answer.cut
    named = answer.headers.get("content-encoding", "").lower()
    packed = data[:2] == b"\x1f\x8b" or "gzip" in named or "deflate" in named
    for bits in (47,) * packed + (-15,) * ("deflate" in named):  # 47: gzip or zlib
        found, ended = _inflate(data, bits, most + 1)
        if found:
            data, missing = found, missing or "compressed data" * (not ended)
            break
    if len(data) > most:
        data, missing = data[:most], _TOO_LONG
    codec = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8"
    return data.decode(codec, "replace").strip("\ufeff\0 \t\r\n"), missing


def _inflate(data: bytes, bits: int, most: int) -> Tuple[bytes, bool]:
    """Up to `most` bytes of what was compressed, and whether it came to its end."""
    machine, found, members = zlib.decompressobj(bits), bytearray(), 0
    with contextlib.suppress(zlib.error):
        for start in range(0, len(data), _SLICE):  # as unused_data copies all the rest
            rest = data[start:start + _SLICE]
            while rest and len(found) < most and members < _MAX_MEMBERS:
                if machine.eof:
                    machine, members = zlib.decompressobj(bits), members + 1
                found += machine.decompress(rest, most - len(found))
                rest = machine.unused_data
    return bytes(found), machine.eof


def _value(text: str, streamed: bool) -> Any:
    """The value of a body that is JSON or a stream of it; other text as it stands.

    A stream that breaks off may say [DONE] all the same, so only a finish_reason proves
    its end. One that nobody asked for would come again: there [DONE] has to do.
    """
    if not _STREAM.match(text):
        data = _loosely(text)
        return data[0] if isinstance(data, list) and len(data) == 1 else data
    data = _assemble(text)
    done = data.pop("[DONE]", False) and not streamed
    whole = done or all(choice.get("finish_reason") for choice in data["choices"])
    return data if whole or _trouble(data) else text


def _assemble(text: str) -> Dict[str, Any]:
    """The answer that server-sent events amount to, as if it had come at once."""
    data = _join("", list(_events(text)), False) or {}
    choices = data.get("choices") if isinstance(data.get("choices"), list) else ()
    data["choices"] = sorted(
        (choice for choice in choices or () if isinstance(choice, dict)),
        key=lambda choice: str(choice.get("index")).zfill(9))
    data["object"] = "chat.completion"
    for choice in data["choices"]:
        delta = choice.pop("delta", None)
        if delta or not {"message", "text"} & set(choice):
            choice["message"] = dict({"content": None}, **(
                delta if isinstance(delta, dict) else {}))
    return data


def _events(text: str) -> Iterator[Dict[str, Any]]:
    """The objects that a stream sends. Heartbeats are none; [DONE] becomes a field."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    for event in text.split("\n\n", _MAX_EVENTS)[:_MAX_EVENTS]:
        fields = [line.partition(":")[::2] for line in event.split("\n", _MAX_EVENTS)]
        lines = [line.strip() for name, line in fields if name.strip() == "data"]
        failed = ("event", "error") in [(name, kind.strip()) for name, kind in fields]
        values = [_loosely("\n".join(lines))]
        if isinstance(values[0], str):  # or each line is an event, without a blank one
            values = list(map(_loosely, lines))
        for value in values:
            if failed and not (isinstance(value, dict) and value.get("error")):
                value = {"error": value or "an event named error"}
            if isinstance(value, str) and value.startswith("{"):
                return  # cut off: what follows would leave a hole
            if value == "[DONE]" or isinstance(value, dict):
                yield value if isinstance(value, dict) else {value: True}


def _join(name: str, parts: List[Any], pieces: bool) -> Any:
    """The value of a field of which a stream has sent parts: pieces of it, or news."""
    parts = [part for part in parts if part is not None]
    kind = type(parts[-1]) if parts else None
    parts = [part for part in parts if type(part) is kind]
    if kind is dict:
        found: Dict[str, List[Any]] = {}
        for field, value in itertools.chain.from_iterable(map(dict.items, parts)):
            found.setdefault(field, []).append(value)
        return {field: _join(field, values, pieces or field in _PIECES)
                for field, values in found.items() if field != "index" or not pieces}
    if kind is list and (pieces or name == "choices"):
        return [_join("", group, pieces) for group in _groups(
            itertools.chain.from_iterable(parts))]
    if kind is str and pieces:  # dict: each piece once, in their order
        return "".join(dict.fromkeys(parts) if name in _ONCE else parts)
    return next(filter(None, reversed(parts)), parts[-1] if parts else None)


def _groups(items: Iterable[Any]) -> List[List[Any]]:
    """Which items are parts of one: those of the same index, until another id comes."""
    groups: List[List[Any]] = []
    current: Dict[str, Tuple[Any, List[Any]]] = {}
    for item in items:
        if not (isinstance(item, dict) and {"index", "function", "delta"} & set(item)):
            groups.append([item])
            continue
        place, known = str(item.get("index", 0)), item.get("id")
        former, group = current.get(place, (None, []))
        if not group or known and former and known != former:
            group = []
            groups.append(group)
        group.append(item)
        current[place] = (known or former, group)
    return groups


def _parse(text: str, depth: int = _MAX_DEPTH) -> Any:
    """The value of a JSON text, no matter who wrote it. Raises ValueError."""
    if text.count("[") + text.count("{") > depth:  # those outside of strings count
        outside = "".join(text.replace("\\\\", "").replace('\\"', "").split('"')[::2])
        level = 0
        for run in re.finditer(r"[\[{]+|[\]}]+", outside):
            level += len(run.group()) if run.group()[0] in "[{" else -len(run.group())
            if level > depth:
                raise ValueError("JSON nested more than %d deep" % depth)
    return _decode(text)


def _loosely(text: str) -> Any:
    """The value of a JSON text; any other text as it stands."""
    with contextlib.suppress(ValueError):
        return _parse(text)
    return text


def _number(digits: str) -> Any:
    value = float(digits)  # at once, where int() of a million digits takes minutes
    if not abs(value) < math.inf:
        raise ValueError("%.20s is beyond all bounds" % digits)
    return int(digits) if digits.lstrip("-").isdigit() else value


_decode = json.JSONDecoder(parse_float=_number, parse_int=_number,
                           parse_constant=lambda name: None).decode  # NaN, Infinity


def _hider(*keys: str) -> Callable[[str], str]:
    """Takes keys out of a text, however JSON may write them, even twice over."""
    find = re.compile("|".join("".join(r"(?:%s%s|\\%su00(?i:%02x))" % (
        "" if sign.isalnum() else r"\\{0,8}", re.escape(sign), "{1,8}" if place else "",
        ord(sign)) for place, sign in enumerate(key))
        for key in keys if len(key) >= _MIN_SECRET) or "(?!)")
    return lambda text: find.sub("***", text)


def _code(error: Error) -> str:
    return error.code or "http_%s" % error.status_code


# Settings


class _Endpoint:
    """Where requests go and what each of them says: a client's settings, checked."""

    def __init__(self, api_key: Optional[str], base_url: Optional[str],
                 headers: Optional[Dict[str, str]], ca_file: Optional[str],
                 allow_http: bool) -> None:
        own, key = _headers(headers or {}), _key(api_key)
        self.secrets = {name: value for name, value in own.items() if _is_secret(name)}
        self.hide = _hider(key, *(value.split()[-1] for value in self.secrets.values()))
        parts = _split_url(base_url, allow_http, self.hide)
        secure, host = parts.scheme == "https", parts.hostname or ""
        if "Authorization" not in own and key:
            self.secrets["Authorization"] = "Bearer " + key
        elif secure and not {"Authorization", "Api-Key"} & set(own):
            raise ConfigurationError(
                "there is no API key: set COMETAPI_KEY, or pass api_key=")
        self.headers = dict(
            {"User-Agent": "cometlimit/" + __version__, "Accept": "application/json",
             "Accept-Encoding": "identity", "Content-Type": "application/json"},
            **{name: own[name] for name in set(own) - set(self.secrets)})
        self.base_url = self.hide(urllib.parse.urlunsplit(parts))
        self.route = parts.path + "/chat/completions"
        parts = parts._replace(path=self.route)
        self.url = urllib.parse.urlunsplit(parts)
        self.address = (host, parts.port or (443 if secure else 80))
        self.place = ("[%s]:%d" if ":" in host else "%s:%d") % self.address
        self.context = _tls_context(ca_file) if secure else None
        self._go_through(*_proxy(parts, allow_http))

    def _go_through(self, proxy: Optional[Tuple[str, int]], login: str) -> None:
        """A proxy, if there is one: by a CONNECT for https; for http it gets the URL."""
        parts = urllib.parse.urlsplit(self.url)
        self.proxy, self.connect, self.hint = proxy, b"", ""
        self.target = self.url  # that is asked for in the first line of each request
        if proxy is None or self.context:
            self.target = urllib.parse.urlunsplit(("", "") + parts[2:])
        if proxy is None:
            if os.environ.get("all_proxy") or os.environ.get("ALL_PROXY"):
                self.hint = " (all_proxy is not used: name the proxy in https_proxy)"
            return
        if self.context:
            self.connect = "CONNECT {0} HTTP/1.1\r\nHost: {0}\r\n{1}\r\n".format(
                self.place, login and "Proxy-Authorization: %s\r\n" % login).encode()
        elif login:
            self.secrets["Proxy-Authorization"] = login
        self.place = "the proxy %s:%d" % proxy


def _check_options(client: Client) -> None:
    for name, least in (("max_concurrency", 1), ("max_retries", 0)):
        value = getattr(client, name)
        if type(value) is not int or value < least:
            raise ConfigurationError("%s is a whole number from %d, not %r" % (
                name, least, value))
    for name, unit in (("max_delay", "seconds"), ("timeout", "seconds"),
                       ("deadline", "seconds"), ("max_rate", "requests a second")):
        value = getattr(client, name)
        if value is None and name in ("deadline", "max_rate"):
            continue
        if type(value) not in (int, float) or not 0 < value < threading.TIMEOUT_MAX:
            raise ConfigurationError("%s is a number of %s above 0, not %r" % (
                name, unit, value))
    for name in ("check", "on_record"):
        if not (getattr(client, name) is None or callable(getattr(client, name))):
            raise ConfigurationError("%s is a function, not %r" % (
                name, getattr(client, name)))
    if client.stream not in (None, True, False):
        raise ConfigurationError("stream is None, True or False")


def _payload(prompt: Prompt, params: Dict[str, Any]) -> Tuple[str, bytes]:
    """The model and the body of a request. Raises ConfigurationError."""
    fields = prompt if isinstance(prompt, dict) else {"messages": (
        [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)}
    body = dict(params, **fields)
    messages, model = body.get("messages"), body.get("model")
    if not (messages and isinstance(messages, (list, tuple))
            and all(isinstance(message, dict) for message in messages)):
        raise ConfigurationError(
            "a prompt is a string, a list of messages (dicts), or a dict with such "
            "messages, not %s" % type(prompt).__name__)
    if not isinstance(model, str) or not model:
        raise ConfigurationError('no model is named: Client(model="your-model-id")')
    if body.get("stream", True) in (False, None):
        del body["stream"]
    for name in sorted(set(body) & (_OPTIONS | {"stream_options"}) - {"model"}):
        raise ConfigurationError("%s is no field of a request: see Client(%s=)" % (
            name, name[:6] if name == "stream_options" else name))
    try:
        return model, _encode(body).encode()
    except (TypeError, ValueError, RecursionError) as fault:
        raise ConfigurationError("the request is no JSON: %s" % fault) from None


_is_secret = re.compile("(?i).*(auth|key|token|secret|cookie)").match


def _headers(headers: Dict[str, str]) -> Dict[str, str]:
    """Headers of the caller's own, by their names as Authorization or Api-Key."""
    for name, value in headers.items():
        if not (isinstance(name, str) and re.match(r"[!#-'*+.^_`|~0-9A-Za-z-]+\Z", name)
                and isinstance(value, str) and re.match(r"[ -~]*[!-~][ -~]*\Z", value)):
            raise ConfigurationError(
                "headers= has a name or a value that no header can have: %r" % (name,))
        if name.title() in ("Host", "Connection", "Content-Length", "Transfer-Encoding"):
            raise ConfigurationError("the header %s cannot be set" % name)
    return {name.title(): value.strip() for name, value in headers.items()}


def _key(given: Optional[str]) -> str:
    key = os.environ.get("COMETAPI_KEY", "") if given is None else given
    blank = " \t\r\n\ufeff\udcef\udcbb\udcbf"  # the last: what 3.6 may read for \ufeff
    key = key.strip(blank) if isinstance(key, str) else ""
    if not re.match(r"[!-~]*\Z", key):  # http.client would send some, and show others
        raise ConfigurationError(
            "the API key has a character that no key has (a space, a line break, a "
            "typographic quote): copy it again")
    return key


def _split_url(given: Optional[str], allow_http: bool,
               hide: Callable[[str], str]) -> urllib.parse.SplitResult:
    """The base URL's parts, its path without /chat/completions or a last slash."""
    if given is None:
        given = os.environ.get("COMETAPI_BASE_URL", "").strip() or BASE_URL
    given = str(given).strip()
    try:
        parts = urllib.parse.urlsplit(given)
        host, port = parts.hostname or "", parts.port
        host.encode("idna")  # fails for a part of more than 63 letters
        problem = next((words for bad, words in (
            (not re.match(r"[!-~]*\Z", given), "a character that no URL has"),
            (parts.scheme not in ("http", "https"), "https:// is missing"),
            (not host or port == 0, "no host or no port"),
            ("@" in parts.netloc, "a user name (the key goes into COMETAPI_KEY)"),
            ("#" in given, "a fragment"),
            (parts.scheme == "http" and not (allow_http or _is_this_machine(host)),
             "http:// shows the key to others: say https://, or allow_http=True")
        ) if bad), "")
    except ValueError as fault:
        problem = str(fault)
    if problem:
        raise ConfigurationError(hide("the base URL %r cannot be used: %s" % (
            re.sub("//.*@", "//***@", given), problem)))
    return parts._replace(path=re.sub(r"(/chat/completions)?/*\Z", "", parts.path))


_is_this_machine = re.compile(r"(localhost|127(\.\d{1,3}){3}|0\.0\.0\.0|::1?)$").match


def _tls_context(ca_file: Optional[str]) -> Any:
    if ssl is None:
        raise ConfigurationError("https needs an interpreter with the ssl module")
    name = "ca_file" if ca_file else next(
        filter(os.environ.get, ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")), "the system")
    extra = ca_file or os.environ.get(name)
    try:
        context = ssl.create_default_context()
        context.set_alpn_protocols(["http/1.1"])
        if hasattr(ssl, "TLSVersion"):  # before 3.7, and until 3.9 by default, any goes
            context.minimum_version = max(
                context.minimum_version, ssl.TLSVersion.TLSv1_2)
        else:
            context.options |= ssl.OP_NO_TLSv1 | ssl.OP_NO_TLSv1_1
        if extra:
            context.load_verify_locations(
                **{"capath" if os.path.isdir(extra) else "cafile": extra})
        return context
    except (OSError, ValueError, TypeError) as fault:
        raise ConfigurationError("the CA certificates of %s (%r) cannot be loaded: %s"
                                 % (name, extra, fault)) from None


def _proxy(server: urllib.parse.SplitResult,
           allow_http: bool) -> Tuple[Optional[Tuple[str, int]], str]:
    """The proxy that the environment has for a URL, and the login that it wants."""
    named = urllib.request.getproxies().get(server.scheme)
    if not named or urllib.request.proxy_bypass(server.netloc):
        return None, ""
    try:
        parts = urllib.parse.urlsplit(named if "://" in named else "http://" + named)
        host, port = parts.hostname or "", parts.port or 80
    except ValueError:
        host = ""
    if not host or parts.scheme != "http":
        raise ConfigurationError("the proxy of %s_proxy cannot be used: only "
                                 "http://host:port can" % server.scheme)
    if server.scheme == "http" and not (allow_http or _is_this_machine(host)):
        return None, ""  # no other machine shall see the key
    login = "%s:%s" % (parts.username, parts.password or "")
    return (host, port), parts.username and "Basic " + binascii.b2a_base64(
        urllib.parse.unquote_to_bytes(os.fsencode(login)), newline=False).decode() or ""


# The command line

_EPILOG = """\
examples:
  python3 cometlimit.py --demo
  python3 cometlimit.py -m MODEL "Say hello." "Write a title."
  python3 cometlimit.py -m MODEL -i requests.jsonl -o results.jsonl

Prompts come back as a JSON array of answers. Input rows are OpenAI Batch
requests, {"prompt": ...}, JSON strings or plain lines; output rows are OpenAI
Batch results. The output file is the checkpoint: the same command again sends
only what is missing or failed. Exit status: 0 all answered, 1 some failed,
2 nothing sent, 3 stopped early (run it again), 128 + N ended by signal N."""

_TICK = 0.25    # seconds between two looks at the clock, and between two drawings of the bar
_PLAIN = 30.0   # seconds between two lines of progress where there is no terminal
_GRACE = 5.0    # seconds that a stopped run leaves to what is in flight
_ALIKE = 5      # rows that fail alike for good, no answer between: that is no matter of the rows
_PATIENCE = 50  # the same of failures that might have passed
_SIGPIPE = 13   # which Windows does not name


def main(argv: Optional[List[str]] = None) -> int:
    """The command line. Returns the exit status."""
    try:
        options = _options(argv)
        with contextlib.ExitStack() as stack:
            return _demo(stack) if options.demo else _Job(options, stack).run()
    except SystemExit as end:  # argparse's
        return int(end.code or 0)
    except KeyboardInterrupt:  # before anything was sent
        return 128 + signal.SIGINT
    except (Error, OSError) as error:
        _say("cometlimit: error: %s" % error)
        return 2


def _say(text: str, passing: bool = False) -> None:
    """Write a line to stderr, if it can be; a passing one is overwritten by the next."""
    # No server's words may steer the terminal.
    text = "".join(c if c.isprintable() or c == "\n" else "\\x%02x" % ord(c) for c in text)
    try:
        if passing:
            text = text[:os.get_terminal_size(sys.stderr.fileno()).columns - 1] + "\x1b[K\r"
        sys.stderr.write(text if passing else text + "\n")
        sys.stderr.flush()
    except (OSError, AttributeError):  # full or closed: the interpreter is not to try it again
        sys.stderr = None


def _options(argv: Optional[List[str]]) -> Any:
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        options.param, options.shard = dict(map(_param, options.param)), _shard(options.shard)
    except ValueError:
        parser.error("--param is NAME=JSON, and --shard I/N with I from 1 to N")
    options.key = "none" if options.dry_run or options.demo else (
        os.environ.get(options.api_key_env))
    options.array = not (options.input_file or options.output_file)
    if options.prompts and options.input_file:
        parser.error("give either prompts or -i")
    if options.prompts in ([], ["-"]) and not (options.input_file or options.demo):
        options.input_file = "-"
        if sys.stdin is None or sys.stdin.isatty():
            parser.error("nothing to ask: give prompts, -i FILE or lines on stdin")
    if options.model == "" or options.array and not (options.model or options.demo):
        parser.error("name a model: -m MODEL")
    if not (options.deadline > 0 and options.max_failures > 0):
        parser.error("--deadline and --max-failures are numbers above 0")
    if not options.key:
        parser.error("there is no API key: set %s" % options.api_key_env)
    if argv is None:  # 3.6 in the C locale takes UTF-8 for bytes that it cannot read
        options.prompts = [os.fsencode(text).decode("utf-8", "replace") for text in options.prompts]
    return options


def _parser() -> Any:
    import argparse  # here, as the library's start is not to wait for it
    parser = argparse.ArgumentParser(
        prog="cometlimit", description=(__doc__ or "").partition("\n")[0], epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)  # or --api-key KEY would pass for --api-key-env, and show the key
    add = parser.add_argument
    add("prompts", nargs="*", metavar="PROMPT", help="or - for one a line on stdin")
    add("-m", "--model", metavar="MODEL", help="for rows that name none")
    add("-i", "--input-file", metavar="FILE", help="rows to ask; - is stdin")
    add("-o", "--output-file", metavar="FILE", help="rows of results; - is stdout")
    add("-c", "--max-concurrency", type=int, default=5, metavar="N", help="in flight at once (5)")
    add("--retries", type=int, default=4, metavar="N", help="attempts after the first (4)")
    add("--timeout", type=float, default=600.0, metavar="SEC", help="of one attempt (600)")
    add("--deadline", type=float, default=math.inf, metavar="SEC", help="stop after so long")
    add("--max-failures", type=float, default=math.inf, metavar="N", help="stop after N failed")
    add("--param", action="append", default=[], metavar="NAME=JSON", help="a field of each body")
    add("--system", metavar="TEXT", help="a system message before each plain prompt")
    add("--shard", default="1/1", metavar="I/N", help="of every N rows the I-th")
    add("--joblog", metavar="FILE", help="append a JSON line for every attempt")
    add("--dry-run", action="store_true", help="check the input, send nothing")
    add("--base-url", metavar="URL", help="else COMETAPI_BASE_URL, else CometAPI's")
    add("--api-key-env", default="COMETAPI_KEY", metavar="NAME", help="the key's variable")
    add("-q", "--quiet", action="store_true", help="no progress, no summary")
    add("--demo", action="store_true", help="see it find the limit of a server of its own")
    add("--version", action="version", version="%(prog)s " + __version__)
    return parser


def _param(text: str) -> Tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise ValueError
    return name, _loosely(value)


def _shard(text: str) -> Tuple[int, int]:
    at, shards = map(int, text.split("/"))
    if not 1 <= at <= shards:
        raise ValueError
    return at - 1, shards


# Rows


class _Row(NamedTuple):
    """A question of the input."""

    id: str      # its custom_id, else its line
    order: int   # its place among the rows of this run
    line: int
    mark: int    # made of what it says: by it another input is known
    body: Dict[str, Any]
    problem: Optional[ConfigurationError]  # why it cannot be asked


def _rows(lines: Iterable[bytes], options: Any) -> Iterator[_Row]:
    """The rows of the shard. Only \\n ends a line: other ends may stand inside of strings."""
    count, (at, shards) = 0, options.shard
    for number, line in enumerate(lines, 1):
        if line.startswith(b"\xef\xbb\xbf"):
            line = line[3:]
        line = line.strip(b" \t\r\n\f\v\0")
        if line:
            if count % shards == at:
                yield _row(line, count // shards, number, options)
            count += 1


def _row(line: bytes, order: int, number: int, options: Any) -> _Row:
    name, body, problem = "line-%d" % number, {}, None
    try:
        text = line.decode("utf-8")
        parse = _parse if text[0] == "{" and not options.array else _loosely
        value = parse(text) if text[0] in '{["' else text
        value = value if isinstance(value, dict) else {"prompt": value}
        if isinstance(value.get("custom_id"), (str, int)):
            name = str(value["custom_id"])
        body = _body(value, options)
    except ConfigurationError as fault:
        problem = fault
    except ValueError as fault:
        problem = ConfigurationError("line %d is no JSON: %s" % (number, fault),
                                     code="invalid_json_line")
    return _Row(name, order, number, binascii.crc32(line), body, problem)


def _body(value: Dict[str, Any], options: Any) -> Dict[str, Any]:
    """The fields of a request, with the messages under "prompt", from any form of row."""
    url, given = str(value.get("url", "/chat/completions")), value.get("body", value)
    if value.get("method", "POST") != "POST" or not url.endswith("/chat/completions"):
        raise ConfigurationError("only POST to /v1/chat/completions can be asked")
    if not isinstance(given, dict):
        raise ConfigurationError("the body of a row is an object")
    body = dict(dict({"model": options.model}, **options.param), **given)
    for name in ("custom_id", "method", "url"):
        body.pop(name, None)
    messages = body.pop("messages", None)
    prompt = body.setdefault("prompt", messages)
    if options.system and isinstance(prompt, str):
        body["prompt"] = [{"role": "system", "content": options.system},
                          {"role": "user", "content": prompt}]
    if options.dry_run:
        _payload(_prompt(body), {})
    return body


def _prompt(body: Dict[str, Any]) -> Any:
    fields = dict(body)
    prompt = fields.pop("prompt", None)
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    return dict(fields, messages=prompt)


def _result(row: _Row, outcome: Union[Completion, Error]) -> bytes:
    """The OpenAI Batch output line. A failure stands in both the places where readers look for it:
    https://github.com/openai/openai-openapi/issues/302"""
    status, body = getattr(outcome, "status_code", 200), outcome.body
    error: Optional[Dict[str, Any]] = None
    if isinstance(outcome, Error):
        error = {"code": _code(outcome), "message": str(outcome)}
        if isinstance(outcome, ConfigurationError):
            error["line"] = row.line
        if not isinstance(body, dict):
            body = {"error": {"message": body, "type": None, "param": None, "code": None}}
    response = {"status_code": status, "request_id": outcome.request_id, "body": body}
    names = binascii.crc32(row.id.encode("utf-8", "backslashreplace")), row.mark
    return json.dumps({"id": "batch_req_%08x%08x" % names, "custom_id": row.id,
                       "response": response if status else None, "error": error}).encode() + b"\n"


def _answered(result: Dict[str, Any]) -> bool:
    """Whether an output line, whoever wrote it, holds an answer."""
    response = result["response"]  # which even the oddest results have, and requests have not
    if result.get("error") is not None or not isinstance(response, dict):
        return False
    if "status_code" not in response:  # the completion itself, as old versions of vLLM have it
        return bool(response.get("choices"))
    body = response.get("body")
    return (response["status_code"] in range(200, 300) and isinstance(body, dict)
            and bool(body) and not body.get("error"))


# Results


def _write(fd: int, data: bytes) -> None:
    """All of it or an OSError: file objects keep what a full disk refused, and write it later."""
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left):]


def _stdout() -> Callable[[bytes], Any]:
    """What writes to stdout, whatever stands for it."""
    out: Any = sys.stdout
    if out is None:
        raise ConfigurationError("stdout is closed: the answers would go nowhere")
    out.flush()
    try:
        fd = out.fileno()
        return lambda data: _write(fd, data)
    except OSError:  # a stream of Python's
        return out.buffer.write if hasattr(out, "buffer") else lambda data: out.write(data.decode())


class _Stream:
    """Results to a pipe, in the order of the rows: what comes early is held back."""

    def __init__(self, write: Callable[[bytes], Any], array: bool) -> None:
        self.write, self.array = write, array
        self.early: Dict[int, bytes] = {}
        self.written = 0

    def put(self, row: _Row, outcome: Union[Completion, Error]) -> int:
        """Take a result; returns how many have gone out by it."""
        if self.array:  # half a surrogate pair becomes the escape that JSON has for it
            text = json.dumps(getattr(outcome, "text", None), ensure_ascii=False)
            self.early[row.order] = text.encode("utf-8", "backslashreplace")
        else:
            self.early[row.order] = _result(row, outcome)
        before = self.written
        while self.written in self.early:
            self._emit(self.early.pop(self.written))
        return self.written - before

    def close(self, rows: int) -> None:
        for order in range(self.written, rows):  # after a stop there may be gaps
            self._emit(self.early.get(order, b"null" if self.array else b""))
        if self.array:
            self.write(b"]\n" if rows else b"[]\n")

    def _emit(self, data: bytes) -> None:
        if self.array:
            data = (b",\n " if self.written else b"[") + data
        self.written += 1
        self.write(data)


class _Checkpoint:
    """Results to a file, which is all that a resumed run needs.

    A result is appended, in one piece, as soon as it is there, whatever is still open before it: a
    kill costs none that was received. close() puts the rows into the input's order and leaves only
    the last of each, in a copy that takes the file's place.

    A place is the offset of a row's line + 1: negative for a failure, which gives way; 0: none.
    """

    def __init__(self, fd: int, path: str, places: Dict[str, int]) -> None:
        self.fd, self.path = fd, path
        self.places = places              # of the rows of the input, in its order
        # Of rows not met yet, << 32, with the mark: tuples would take 100 bytes more for each.
        self.found: Dict[str, int] = {}
        self.lines = self.end = 0
        self.gap = b""                    # what is missing at the end
        self._lock()
        self._load()

    def _lock(self) -> None:
        try:
            import fcntl
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samefile(self.fd, self.path):
                raise BlockingIOError  # a run that has just ended put another file in its place
        except ImportError:  # on Windows
            pass
        except BlockingIOError:
            raise ConfigurationError("another run writes to %s" % self.path) from None

    def _load(self) -> None:
        bad, start = 0, b'{"id": "batch_req_'
        with open(self.path, "rb") as lines:
            for line in lines:
                whole = line.endswith(b"\n")
                try:
                    self._learn(_parse(line.decode("utf-8").lstrip("\ufeff"), 2 * _MAX_DEPTH))
                except (ValueError, LookupError, TypeError, AttributeError):
                    if not whole and (self.found or line[:len(start)] == start[:len(line)]):
                        break  # torn by a kill: the next row takes its place
                    bad += 1
                self.lines, self.end = self.lines + 1, self.end + len(line)
                self.gap = b"" if whole else b"\n"
        if bad:
            _say("cometlimit: %d lines of %s are no results" % (bad, self.path))
            if not self.found:
                raise ConfigurationError("%s holds something else: it is left as it is" % self.path)

    def _learn(self, result: Any) -> None:
        name, place = str(result["custom_id"]), self.end + 1
        if _answered(result):
            mark = re.match("batch_req_[0-9a-f]{8}([0-9a-f]{8})$", str(result.get("id")))
            self.found[name] = place << 32 | (int(mark.group(1), 16) if mark else 0)
        elif self.found.get(name, 0) <= 0:
            self.found[name] = -place << 32

    def place(self, row: _Row) -> int:
        """Where the result of a row that is met stands. Raises ConfigurationError."""
        place, mark = divmod(self.found.get(row.id, 0), 1 << 32)
        if mark not in (0, row.mark):
            raise ConfigurationError("%s is of another input: there, %r asked something else"
                                     % (self.path, row.id))
        self.found.pop(row.id, None)
        return place

    def put(self, row: _Row, outcome: Union[Completion, Error]) -> int:
        line, place = self.gap + _result(row, outcome), self.end + len(self.gap) + 1
        try:
            os.ftruncate(self.fd, self.end)
            _write(self.fd, line)
        except OSError:  # a full disk takes half a row
            os.ftruncate(self.fd, self.end)
            raise
        if isinstance(outcome, Completion):
            self.places[row.id] = place
        elif self.places.get(row.id, 0) <= 0:
            self.places[row.id] = -place
        self.lines, self.end, self.gap = self.lines + 1, self.end + len(line), b""
        return 1

    def close(self, _: int) -> None:
        self.places.update((name, found >> 32) for name, found in self.found.items())
        order = [abs(place) for place in self.places.values() if place]
        os.ftruncate(self.fd, self.end)
        if len(order) == self.lines and order == sorted(order):
            return
        draft = self.path + ".sorted"
        try:
            with open(self.path, "rb") as rows, open(draft, "wb") as copy:
                for place in order:
                    rows.seek(place - 1)
                    copy.write(rows.readline().rstrip(b"\n") + b"\n")
                copy.flush()
                os.fsync(copy.fileno())
            os.chmod(draft, os.stat(self.path).st_mode & 0o777)
            os.replace(draft, self.path)
        except OSError as fault:
            _say("cometlimit: %s is whole, but not in the input's order: %s" % (self.path, fault))
            if os.path.exists(draft):
                os.unlink(draft)


# A run


class _Tally:
    """What became of the rows of a run: counted, and shown on stderr."""

    def __init__(self, options: Any) -> None:
        self.options = options
        self.total: Optional[int] = None  # rows, if that is known beforehand
        self.kept = self.answers = self.failures = 0  # kept: answered by an earlier run
        self.errors: Dict[str, List[Any]] = {}  # by code: how many, and the first
        self.alike: Dict[Any, int] = collections.Counter()  # failures since the last answer
        self.began = self.shown = time.monotonic()
        shared = options.output_file in (None, "-") and sys.stdout is not None and (
            sys.stdout.isatty())  # by the answers
        self.bar = not (options.quiet or shared or sys.stderr is None) and sys.stderr.isatty()

    def count(self, row: _Row, outcome: Union[Completion, Error]) -> str:
        """Count an outcome. Returns why the run should end by it, or ""."""
        if isinstance(outcome, Completion):
            self.answers += 1
            self.alike.clear()
            return ""
        self.failures += 1
        code, status = _code(outcome), outcome.status_code
        self.errors.setdefault(code, [0, "%s: %s" % (row.id, outcome)])[0] += 1
        if self.options.array:
            _say("cometlimit: %s: %s" % (row.id, outcome))
        if outcome.retryable or isinstance(outcome, APIConnectionError) or (
                status in (401, 402, 403, 404, 429, 503)):  # no matter of the row
            self.alike[code, status] += 1
        if self.alike[code, status] >= (_PATIENCE if outcome.retryable else _ALIKE):
            return "%d rows failed alike, with no answer between" % self.alike[code, status]
        if self.failures >= self.options.max_failures:
            return "%d rows failed" % self.failures
        return ""

    def progress(self, client: Client) -> str:
        asked, total = self.answers + self.failures, self.total
        done, rate = self.kept + asked, asked / max(0.001, self.shown - self.began)
        text = "%d%s done" % (done, "" if total is None else "/%d" % total)
        if total and self.bar:
            text = "[%-16s] %s" % ("#" * (16 * done // total), text)
        text += ", %d failed" % self.failures if self.failures else ""
        if total and rate:
            text += ", %d:%02d left" % divmod((total - done) / rate, 60)
        text += ", %.1f/s" % rate
        for (_, model), stats in sorted(client.metrics.items()):
            limits = ", ".join(words % value for words, value in (
                ("rate limit %.3g/s", stats.rate), ("window %d", stats.window),
                ("429 x %d", stats.statuses[429])) if value)
            text += "; %s: %s" % (model, limits) if limits else ""
        return text

    def summary(self, client: Client) -> Iterator[str]:
        form = "%-20s %8s %8s %7s %10s %10s %6s %6s"
        yield form % ("model", "requests", "answers", "retries", "tokens in", "out", "p50 s",
                      "p95 s")
        for (_, model), stats in sorted(client.metrics.items()):
            yield form % (model, stats.requests, stats.answers, stats.retries, stats.prompt_tokens,
                          stats.completion_tokens, "%.2f" % stats.latency(0.5),
                          "%.2f" % stats.latency(0.95))
            yield "  statuses: " + ", ".join("%s x %d" % (status or "none", stats.statuses[status])
                                             for status in sorted(stats.statuses, key=str))
        for code, (count, sample) in sorted(self.errors.items()):
            yield "%d x %s, first %s" % (count, code, sample)
        yield "%d answered, %d failed, %d kept, %.1f s" % (
            self.answers, self.failures, self.kept, time.monotonic() - self.began)


class _Job:
    """One run: rows in, results out.

    A thread of its own reads the input, so that neither results nor signals wait for it. This one,
    the main thread, does all the rest, and it alone writes.
    """

    def __init__(self, options: Any, stack: contextlib.ExitStack) -> None:
        self.options, self.stack, self.tally = options, stack, _Tally(options)
        self.events: Any = queue.Queue()  # what happened: the method for it, and its argument
        self.calls: Dict[Future, _Row] = {}  # under way
        self.places: Dict[str, int] = {}    # by id: above 0 where there is an answer already
        self.files: Dict[str, int] = {}     # that are open, by what they are for
        self.rows = self.signal = 0         # rows that were met
        width = max(1, options.max_concurrency)
        self.room = threading.Semaphore(2 * width)        # rows without an outcome
        self.space = threading.Semaphore(_AHEAD * width)  # rows that are not written
        self.reading, self.reason, self.until = False, "", math.inf  # why, and when it ends early
        self.client = Client(
            api_key=options.key, base_url=options.base_url, timeout=options.timeout,
            max_retries=options.retries, max_concurrency=options.max_concurrency,
            on_record=lambda record: self.events.put((self._log, record)))
        stack.callback(self.client.close)
        self.source, self.known = self._input(options.input_file)
        self.sink = self._output(options.output_file or "-")

    def run(self) -> int:
        """Returns the exit status. Raises ConfigurationError or OSError before anything is sent."""
        options, lost = self.options, False
        if options.dry_run:
            return int(self._survey() > 0)
        if self.known:
            self._survey()
            self.tally.total = self.rows
        self.joblog = options.joblog and self._open("job log", options.joblog, os.O_WRONLY)
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.stack.callback(signal.signal, number, signal.signal(number, self._on_signal))
        self.reading = True
        threading.Thread(target=self._read, daemon=True).start()
        try:
            while self.calls or self.reading and not self.reason or not self.events.empty():
                with contextlib.suppress(queue.Empty):
                    handle, what = self.events.get(timeout=_TICK)
                    handle(what)
                self._look()
            self.sink.close(self.rows)
        except OSError as fault:  # nothing of what is still in flight could be written either
            lost, self.reason = True, "the results cannot be written: %s" % fault
            if isinstance(fault, BrokenPipeError):
                self.signal = _SIGPIPE  # as `head` leaves: quietly
        return self._end(lost)

    def _input(self, path: Optional[str]) -> Tuple[Any, bool]:
        """The input's lines, and whether they are known beforehand: can be read twice."""
        if path is None:  # JSON strings, as a prompt may have lines
            return [json.dumps(prompt).encode() for prompt in self.options.prompts], True
        # Not sys.stdin: a thread that waits for it would abort the interpreter's end.
        source = open(sys.stdin.fileno() if path == "-" else path, "rb", closefd=path != "-")
        known = os.path.isfile(source.fileno())
        # A pipe that is still waited for cannot be closed.
        self.stack.callback(lambda: source.close() if known or not self.reading else None)
        self.files["input"] = source.fileno()
        return source, known

    def _output(self, path: str) -> Any:
        array = self.options.array
        if self.options.dry_run and not os.path.isfile(path):
            return None
        if path == "-":
            write = _stdout()
            with contextlib.suppress(OSError):  # a stream of Python's is no file
                self._refuse_open(sys.stdout.fileno(), "stdout")
            return _Stream(write, array)
        if os.path.exists(path) and not os.path.isfile(path):  # a pipe or a device
            fd = self._open("output", path, os.O_WRONLY)
            return _Stream(lambda data: _write(fd, data), array)
        fd = self._open("output", path, os.O_RDWR)
        return _Checkpoint(fd, os.path.realpath(path), self.places)

    def _open(self, role: str, path: str, mode: int) -> int:
        self._refuse_open(path, path)
        self.files[role] = fd = os.open(path, mode | os.O_CREAT | os.O_APPEND, 0o666)
        self.stack.callback(os.close, fd)
        return fd

    def _refuse_open(self, file: Union[str, int], name: str) -> None:
        for role, fd in self.files.items():
            if os.path.isfile(file) and os.path.samefile(file, fd):
                raise ConfigurationError("%s is the %s" % (name, role))

    def _survey(self) -> int:
        """Go through the whole input before anything is sent. Returns how many rows are bad."""
        models: Dict[str, int] = collections.Counter()
        bad = 0
        for row in _rows(self.source, self.options):
            self._meet(row)
            models[str(row.body.get("model"))] += 1
            bad += row.problem is not None
            if row.problem and self.options.dry_run:
                _say("%s: %s" % (row.id, row.problem))
            if self.tally.bar and self.rows % 10000 == 0:
                _say("%d rows read" % self.rows, passing=True)
        if isinstance(self.sink, _Checkpoint) and self.sink.found:
            found = self.sink.found
            raise ConfigurationError("%s is of another input: no row asks for %r, nor for %d more"
                                     % (self.sink.path, min(found), len(found) - 1))
        if self.options.dry_run:
            _say("%d rows, %d bad; by model: %s" % (self.rows, bad, ", ".join(
                "%s x %d" % pair for pair in models.items())))
        elif not isinstance(self.source, list):
            self.source.seek(0)
        return bad

    def _meet(self, row: _Row) -> None:
        """Take note of a row of the input."""
        self.rows = row.order + 1
        if row.id in self.places:
            raise ConfigurationError("line %d: the custom_id %r stands twice in the input"
                                     % (row.line, row.id))
        self.places[row.id] = self.sink.place(row) if isinstance(self.sink, _Checkpoint) else 0
        self.tally.kept += self.places[row.id] > 0

    def _read(self) -> None:
        problem = ""
        try:
            for row in _rows(self.source, self.options):
                self.room.acquire()
                self.space.acquire()
                self.events.put((self._ask, row))
        except (OSError, ValueError) as fault:
            problem = "the input cannot be read: %s" % fault
        self.events.put((self._read_all, problem))

    def _read_all(self, problem: str) -> None:
        self.reading = False
        self._stop(problem)

    def _ask(self, row: _Row) -> None:
        if self.reason:
            return
        try:
            if not self.known:
                self._meet(row)
            if self.places[row.id] > 0:
                self.room.release()
                self.space.release()
                return
            if row.problem is not None:
                raise row.problem
            call = self.client.submit(_prompt(row.body), tag=row.id)
        except ConfigurationError as problem:
            call = Future()
            call.set_exception(problem)
        self.calls[call] = row
        call.add_done_callback(lambda call: self.events.put((self._finish, call)))

    def _finish(self, call: Future) -> None:
        row = self.calls.pop(call)
        outcome: Any = call.exception() or call.result()
        if self.reason and isinstance(outcome, Error) and (
                outcome.retryable or outcome.code == "cancelled"):
            return  # left to the next run
        self.room.release()
        self._stop(self.tally.count(row, outcome))
        for _ in range(self.sink.put(row, outcome)):
            self.space.release()

    def _log(self, record: Record) -> None:
        if self.joblog is not None:
            try:
                _write(self.joblog, json.dumps(record._asdict()).encode() + b"\n")
            except OSError as fault:  # no reason to lose answers
                _say("cometlimit: the job log cannot be written: %s" % fault)
                self.joblog = None

    def _on_signal(self, number: int, _: Any) -> None:
        if self.signal:
            os._exit(128 + number)  # the second one: what was received is written already
        self.signal = number

    def _stop(self, reason: str) -> None:
        """If there is a reason, send nothing more. What is in flight has some seconds left."""
        if reason and not self.reason:
            self.reason, self.until = reason, time.monotonic() + _GRACE
            self.client.stop()

    def _look(self) -> None:
        """Do what is due by the clock."""
        now, tally = time.monotonic(), self.tally
        if self.signal:
            self._stop("signal %d" % self.signal)
        if now - tally.began > self.options.deadline:
            self._stop("its deadline has passed")
        if now > self.until:
            self.client.close()
        if not self.options.quiet and now - tally.shown >= (_TICK if tally.bar else _PLAIN):
            tally.shown = now
            _say(tally.progress(self.client), tally.bar)

    def _end(self, lost: bool) -> int:
        """Say what became of the run, and return its exit status."""
        tally = self.tally
        done = tally.kept + tally.answers + tally.failures
        left = bool(self.reason) and (lost or done != tally.total)
        if not self.options.quiet and self.signal != _SIGPIPE:
            if tally.bar:
                _say("", passing=True)
            _say("\n".join(tally.summary(self.client)))
            if left:
                _say("stopped: %s" % self.reason)
            if (left or tally.failures) and isinstance(self.sink, _Checkpoint):
                _say("to go on: python3 " + " ".join(map(shlex.quote, sys.argv)))
        return 128 + self.signal if self.signal else 3 if left else int(tally.failures > 0)


def _demo(stack: contextlib.ExitStack) -> int:
    """A run against a rate-limited server in this process."""
    import socketserver
    rate, prompts, lock, full = 8, 40, threading.Lock(), [0.0]  # when the bucket is full again

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while self.rfile.readline():
                size = int(http.client.parse_headers(self.rfile)["content-length"])
                asked = json.loads(self.rfile.read(size).decode())["messages"][0]["content"]
                status, value = 429, {"error": {"message": "slow down"}}  # type: int, Any
                with lock:
                    soonest = max(full[0], time.monotonic()) + 1 / rate
                    if soonest <= time.monotonic() + 1.0:
                        status, full[0] = 200, soonest
                if status == 200:
                    time.sleep(0.3)
                    value = {"choices": [{"message": {"content": "You said: " + asked}}],
                             "usage": {"prompt_tokens": 6, "completion_tokens": 8}}
                body = json.dumps(value).encode()
                self.wfile.write(b"HTTP/1.1 %d -\r\nContent-Length: %d\r\n\r\n%s" % (
                    status, len(body), body))

    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
    stack.callback(server.server_close)
    stack.callback(server.shutdown)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    print("%d prompts, 20 at once, to a server that allows %d requests a second" % (prompts, rate),
          flush=True)
    options = _options(["--demo", "-m", "demo-model", "-c", "20", "-o", os.devnull, "--base-url",
                        "http://127.0.0.1:%d/v1" % server.server_address[1]]
                       + ["Hello %d." % n for n in range(prompts)])
    job = _Job(options, stack)
    status = job.run()
    for stats in job.client.metrics.values():
        print("answered: %d, refused on the way: %d, lost: %d" % (
            stats.answers, stats.statuses[429], prompts - stats.answers))
    return status


if __name__ == "__main__":
    sys.exit(main())


# MIT License
#
# Copyright (c) 2026 the cometlimit authors
#
# Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
# associated documentation files (the "Software"), to deal in the Software without restriction,
# including without limitation the rights to use, copy, modify, merge, publish, distribute,
# sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is
# furnished to do so, subject to the following conditions:
#
# The above copyright notice and this permission notice shall be included in all copies or
# substantial portions of the Software.
#
# THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT
# NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
# NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM,
# DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT
# OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
