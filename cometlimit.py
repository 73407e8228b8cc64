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
import array
import binascii
import collections
import contextlib
import copy
import email.utils
import errno
import functools
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
import select
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
_MANY = 10              # answers that tell a prompt's own fault from a limit
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
    status: Optional[int]     # None where no answer began
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

    api_key          else COMETAPI_KEY; not needed over http, nor with an Authorization
                     or api-key in headers=
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
        self.place = 0               # among the calls that wait for their turn
        self.ticket: Any = None      # the throttle's, while in flight
        self.refused = math.inf      # the model's answers when it was last refused
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
        self.new: Deque[_Call] = collections.deque()      # without a thread yet
        self.waiting: Deque[_Call] = collections.deque()  # for their turn
        self.answers = 0                    # so far
        self.answered_at = -math.inf        # when the last came
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
            model.new.append(call)
            self.calls[call] = None
        future: Future = call.future
        future.add_done_callback(lambda future: self.give_up(
            [call], "nobody waits for it any more") if future.cancelled() else None)
        try:
            model.executor.submit(self._carry, model)
            model.has_threads = True
        except RuntimeError as fault:
            if not (model.has_threads and "new thread" in str(fault)):
                model.new.remove(call)
                self.calls.pop(call, None)
                raise Error("no thread can be started to send it: %s" % fault,
                            code="no_thread") from None
        return future  # where no more threads can be started, one there is takes it

    def _carry(self, model: _Model) -> None:
        """The backoff loop: it carries a call from its first turn to its outcome.

        It waits for a turn, makes an attempt, learns, decides, backs off, and again.
        """
        outcome: Outcome = APITimeoutError("not sent before its deadline")
        self.workers.add(threading.get_ident())
        call = self.gate.first(model)
        try:
            while self.gate.turn(call):
                verdict = self._attempt(call)
                self._learn(call, verdict)
                outcome, pause = verdict.outcome, self._decide(call, verdict)
                if pause is None:
                    break
                _tell(logging.INFO, "model %s: attempt %d of %d: %s; next in %.1f s",
                      model.name, call.attempts, self.client.max_retries + 1, outcome,
                      pause)
                self.gate.back_off(call, pause)
        finally:  # whatever happened, somebody waits for the outcome
            self._finish(call, outcome)

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
        record = Record(
            request.wall, self.endpoint.route, call.model.name, request.status,
            _now() - request.began, call.attempts, request.began - call.since,
            outcome.request_id, code, *_tokens(outcome.body), call.tag)
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
                model.answers, model.answered_at = model.answers + 1, now
                model.stream = call.stream or model.stream  # it needs what passed
            # Refused again, although many others were answered meanwhile: that is the
            # prompt's own fault, and says nothing about load.
            if load is None or call.given_up or model.answers >= call.refused + _MANY:
                throttle.answered(call.ticket, now)
            else:
                wish = outcome.retry_after if isinstance(outcome, Error) else None
                throttle.refused(call.ticket, now, load, wish)
            call.refused = call.refused if load is None else model.answers
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
                    self.gate.strike_off(call)
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
        self.places = itertools.count()
        self.in_flight = 0
        self.next_at = 0.0        # nothing leaves before, for max_rate
        self.watcher: Optional[_Call] = None
        self.wakes_at = math.inf  # when the watcher looks again

    def first(self, model: _Model) -> _Call:
        """The oldest new call, which from now on waits for its turn."""
        with self.lock:
            call = model.new.popleft()
            self._enter(call)
            return call

    def _enter(self, call: _Call) -> None:
        if not call.given_up:
            call.place = next(self.places)
            call.model.waiting.append(call)

    def turn(self, call: _Call) -> bool:
        """Wait until the call may be sent; False when it may not be any more."""
        with self.lock:
            while call.ticket is None and not call.given_up and _now() < call.expires:
                due = self._admit()
                if call.ticket is None:
                    self._await(call, due)
            if call.ticket is None:
                self.strike_off(call)
            if self.watcher is call:
                self.watcher, self.wakes_at = None, math.inf
                self._look()
            return call.ticket is not None

    def strike_off(self, call: _Call) -> None:
        """What was given up must not get a turn while its thread wakes."""
        with contextlib.suppress(ValueError):
            call.model.waiting.remove(call)

    def leave(self, call: _Call) -> None:
        """The call's attempt has ended."""
        call.ticket, call.since = None, _now()
        self.in_flight -= 1
        self._look()

    def back_off(self, call: _Call, pause: float) -> None:
        """Wait; then the call waits for another turn, behind those that do already."""
        due = _now() + pause
        with self.lock:
            while not call.given_up and _now() < due:
                _wait(call.changed, due - _now())
            self._enter(call)

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
                    elif (first is None
                          or model.waiting[0].place < first.waiting[0].place):
                        first = model
            if first is None:
                return due
            self._send(first.waiting.popleft(), now)
        return math.inf

    def _send(self, call: _Call, now: float) -> None:
        call.ticket = call.model.throttle.sent(now)
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
            first.waiting[0].changed.notify()


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
    GROWN = 25, 47.0    # requests, seconds in which the rate may double: a minute
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
        self._ramp = self.START             # the rate before it is measured
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
            self._hold(ticket.others, now)
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
            self._hold(others, now)

    def _hold(self, window: int, now: float) -> None:
        self.window, self.rate, self._test = window, None, range(0)
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
        self._lost -= self._before + 1
        self._empty, self._since = empty.number, empty.time

    def _growth(self, now: float) -> float:     # 1: the limit may have doubled
        sent, passed = self._count - self._probe, max(0.0, now - self.until)
        return float(min(sent / self.GROWN[0], passed / self.GROWN[1]) ** 2)

    def _interval(self, now: float) -> float:
        if self.window is not None:
            return 0.0
        if self.rate is None:               # doubles each second: ln 2 = 0.69
            return 1 / (self._ramp + 0.69 * (self._count - self._probe))
        return 1 / (self.rate * (self.DIP + self._growth(now)))


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
        """What this share of the latencies did not exceed (1.0: all), +-2.5 %."""
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


def _tokens(body: Any) -> Tuple[int, int]:
    """The prompt's and the answer's tokens, as far as a body tells them."""
    usage = body.get("usage") if isinstance(body, dict) else None
    prompt, answer = (count if isinstance(count, int) else 0 for count in map(
        (usage if isinstance(usage, dict) else {}).get,
        ("prompt_tokens", "completion_tokens")))
    return prompt, answer


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
                "; %d of these by chance" % stats.chance if stats.chance else ""),
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

    __del__ = close  # of a client that is forgotten


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
            self._refuse_cut()  # hang_up() could not find this, nor end its look-up
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
        if self.heard > 2 * _MAX_ANSWER:  # a flood of 1xx answers, say, has no end
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
        return _passing("no answer from %s within %.3g s: raise timeout= (or deadline=)"
                        " if the model needs longer" % (place, request.timeout or 0),
                        504, 2, APITimeoutError, "timeout")
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
# What no repetition cures, as an error's code or type: CometAPI answers an unknown
# model with 503. On a 429 only those above are: some name it invalid_request_error.
PERMANENT = MONEY | _NO_MODEL | frozenset("""
    access_denied access_terminated authentication_error content_filter
    content_policy_violation context_length_exceeded convert_request_failed
    count_token_failed gen_relay_info_failed invalid_api_key invalid_request
    invalid_request_error missing_required_parameter model_price_error permission_denied
    permission_error prompt_blocked sensitive_words_detected""".split())
# CometAPI documents 429, 500, 503, 504, 524 as passing, Groq 498; gateways the others.
RETRYABLE = frozenset({408, 429, 498, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529})
_MINIMAX = {"1002": "429", "1004": "401", "1008": "402"}  # statuses as it codes them
_NAMES = {"code": "code", "status_code": "code", "type": "type", "param": "param",
          "message": "message", "msg": "message", "status_msg": "message"}
_MAX_DEPTH = 200        # json recurses in C: a hostile answer could overrun a stack
_TOO_LONG = "more than %d MiB" % (_MAX_ANSWER >> 20)
_STREAM = re.compile("(data|event|id|retry)?:")  # how server-sent events begin
_UNITS = {"ms": 0.001, "millisecond": 0.001, "s": 1, "sec": 1, "second": 1, "m": 60,
          "min": 60, "minute": 60, "h": 3600, "hr": 3600, "hour": 3600, "day": 86400}
_SPAN = r"([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*(%s)s?(?![a-z])" % "|".join(_UNITS)
# "Please try again in 7m12s", "wait 1 minute and 6 seconds", "retryDelay": "37s"
_IN_WORDS = re.compile(
    r"(?i)(?:try again|retry|\bwait\b|resets in|will reset)[^.0-9]{0,40}(?<!-)"
    r"((?:%s[\s,]*(?:and )?)+)" % _SPAN)
# "retry_after": 10, Retry-After: 12, "retryAfterMs": 350; but no date
_IN_FIELDS = re.compile(
    r"(?i)(?:retry[-_ ]?after|ratelimit-reset)[-_ ]?(ms|seconds|)[\\\s'\":=]{1,5}"
    r"([0-9]{1,15}(?:\.[0-9]{1,15})?)(?!\.?[0-9]|[-:/\s]*\w)")


class _Answer(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes    # longer than _MAX_ANSWER: there is more, which was not read
    cut: str = ""  # why the body ended before its end; "" when it is whole


class _Verdict(NamedTuple):
    outcome: Union[Completion, Error]
    tries: float = 1  # attempts in all that a call may make while it fails like this
    load: Optional[int] = None  # a refusal's status, where it says something about load


def _understand(answer: _Answer, hide: Callable[[str], str], url: str,
                streamed: bool = True) -> _Verdict:
    """The Completion that an answer holds, or the Error that it stands for."""
    text, missing = _text(answer)
    data = _value(text, streamed)
    if 200 <= answer.status < 300 and not _trouble(data):
        with contextlib.suppress(LookupError, TypeError, AttributeError):
            return _Verdict(_completion(data, hide(_request_id(answer)) or None))
    return _failure(answer, text, missing, data, hide, url)


def _completion(data: Any, request_id: Optional[str]) -> Completion:
    """Raises LookupError, TypeError or AttributeError where there is none."""
    choice, usage = data["choices"][0], data.get("usage")
    text, reason = choice["message"].get("content"), choice.get("finish_reason")
    if isinstance(text, list):  # of parts, as some gateways have it
        text = "".join(part.get("text") or "" for part in text)
    return Completion(
        text if isinstance(text, str) else "", str(data.get("model") or ""),
        reason if isinstance(reason, str) else None,
        usage if isinstance(usage, dict) else {}, request_id, 1, 0.0, data)


def _trouble(data: Any) -> Any:
    """The part of a 2xx answer that tells of a failure, if one does."""
    if not isinstance(data, dict):
        return None
    choices, base = data.get("choices"), data.get("base_resp")  # MiniMax's
    code = base.get("status_code") if isinstance(base, dict) else data.get("code")
    success = str(code or 0).lower() in ("0", "200", "none", "ok", "success")
    if data.get("error") or not (choices or success):
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
    said = words.get("message") or " ".join(body[:200].split()) or "an empty body"
    kind: Any = RateLimitError if answer.status == 429 else APIStatusError
    tries, load = _again(answer.status, words)
    if answer.status < 300:
        kind = APIResponseError
        if trouble is None:
            load, (tries, what) = None, _no_answer(answer, text, missing, data, url)
            said = hide(what) + said
    elif answer.status < 400:
        said = "a redirect, which is not followed: check the base URL"
    tries = {"true": math.inf, "false": 1}.get(answer.headers["x-should-retry"], tries)
    return _Verdict(kind(
        " ".join(("HTTP %d %s" % (answer.status, words.get("code", ""))).split()) + ": "
        + said, status_code=answer.status, body=_loosely(body), retryable=tries > 1,
        retry_after=(_wish(answer.headers, str(trouble)[:_MAX_ERROR]) or None
                     if tries > 1 or answer.status == 429 else None),
        request_id=hide(_request_id(answer, words.get("message", ""))) or None,
        **words), tries, load if tries > 1 else None)


def _no_answer(answer: _Answer, text: str, missing: str, data: Any,
               url: str) -> Tuple[float, str]:
    """How often to try for a 2xx with neither an answer nor an error; what it is."""
    if missing == _TOO_LONG:
        return 1, "an answer of %s: " % missing
    if not text or _STREAM.match(text):
        return math.inf, text and "a stream without a finish_reason: "
    if isinstance(data, dict):
        return 2, "an answer without choices: "
    if isinstance(data, str) and missing:
        return math.inf, "cut off (%s): " % missing
    if text[0] == "<" or "html" in answer.headers.get("content-type", "").lower():
        return 1, "a web page from %s: check the base URL (is /v1 missing?): " % url
    return 1, ""


def _again(status: int, words: Dict[str, str]) -> Tuple[float, Optional[int]]:
    """How many attempts a failure deserves, and the load that it shows."""
    code, kind = words.get("code", ""), words.get("type", "")
    # A gateway may put the status that it got itself into `param`.
    own = words.get("param", "") if code == "bad_response_status_code" else ""
    if status < 300:
        own = _MINIMAX.get(code, own or code)
        status = 429 if re.search("(?i)rate_?limit|too_?many_?req", code + kind) else 0
    if re.match("[1-5][0-9][0-9]$", own):
        status = int(own)
    lasting = _NO_MODEL if status == 429 else PERMANENT
    if ({code.lower(), kind.lower()} & lasting or _speaks_of_money(code, kind)
            or status == 429 and _is_too_large(words.get("message", ""))):
        return 1, None
    load = None if status in (0, 408) else status  # 408: that one request was slow
    return (math.inf, load) if status in RETRYABLE | {0} else (1, None)


def _speaks_of_money(*names: str) -> bool:
    return any(n.lower() in MONEY or n.lower()[:8] == "billing_" for n in names)


def _is_too_large(message: str) -> bool:
    """Whether a request exceeds the limit itself: then it never passes."""
    found = re.search(r"(?i)limit\W{1,3}([0-9][0-9,.]{0,20}).{0,80}requested\W{1,3}"
                      r"([0-9][0-9,.]{0,20})", message)
    if not found:  # with numbers such as "Limit 10,000, Requested 44,975."
        return "request too large" in message.lower()
    most, size = (int(re.sub(r"\D", "", number)) for number in found.groups())
    return size > most


def _words(value: Any) -> Dict[str, str]:
    """The code, type, param and message of a failure: the innermost that there are."""
    found: Dict[str, str] = {}
    for depth in range(9):
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, str) and depth:  # gateways put JSON into a text, too
            found.setdefault("message", value)
            value = _loosely(value[value.find("{"):])
        if not isinstance(value, dict):
            break
        for name, word in value.items():
            if name in _NAMES and type(word) in (str, int, float) and word != "":
                found[_NAMES[name]] = str(word)
        value = next(filter(None, map(value.get, (
            "error", "errors", "detail", "base_resp", "message"))), None)
    return found


def _request_id(answer: _Answer, message: str = "") -> str:
    """To quote to the provider. Chained gateways each add theirs: the last is ours."""
    ids = [answer.headers.get(name) for name in (
        "x-request-id", "x-cometapi-request-id", "x-oneapi-request-id", "request-id")]
    ids += re.findall(r"\(request id: ([^)\s]{1,200})\)", message)[-1:]
    return next(filter(None, ids), "")


def _wish(headers: http.client.HTTPMessage, said: str) -> float:
    """The seconds that a server asks to wait, the longest of several; 0.0 for none.
    Gateways drop headers but hand bodies on: the error's words count as much."""
    now = _timestamp(headers.get("date", "")) or _wall()  # ours may differ
    asked = [pair for pair in headers.items() if "retry-after" in pair[0].lower()]
    said = "".join("%s: %s; " % pair for pair in asked) + said
    waits = [0.0] + [_timestamp(value) - now for _, value in asked]
    for found in _IN_WORDS.finditer(said):
        waits.append(sum(float(number) * _UNITS[unit.lower()] for number, unit in
                         re.findall("(?i)" + _SPAN, found.group(1))))
    for unit, number in _IN_FIELDS.findall(said):
        seconds = float(number) * _UNITS.get(unit.lower(), 1.0)
        if seconds > 1e9:  # a time of Unix, in seconds or milliseconds
            seconds = seconds / (1000.0 if seconds > 1e12 else 1.0) - now
        waits.append(seconds)
    return max(wait for wait in waits if wait <= 31 * 86400)  # more cannot be meant


def _timestamp(date: str) -> float:
    """The time of an HTTP date, 0.0 for anything else."""
    with contextlib.suppress(Exception):  # email.utils lets many kinds through
        parts: Any = email.utils.parsedate_tz(date)  # asctime's form is in GMT as well
        return float(email.utils.mktime_tz(parts))
    return 0.0


def _text(answer: _Answer) -> Tuple[str, str]:
    """A body as text, without its compression, and why it is not whole, or ""."""
    most = _MAX_ANSWER if 200 <= answer.status < 300 else _MAX_ERROR
    data, missing = answer.body, answer.cut
    deflate = "deflate" in answer.headers.get("content-encoding", "").lower()
    for form in [47] * (deflate or data[:2] == b"\x1f\x8b") + [-15] * deflate:
        with contextlib.suppress(zlib.error):  # 47: gzip or zlib; -15: without a head
            machine = zlib.decompressobj(form)
            data = machine.decompress(data, most + 1)
            missing = missing or "compressed data" * (not machine.eof)
            break
    if len(data) > most:
        data, missing = data[:most], _TOO_LONG
    return data.decode("utf-8", "replace").strip("\ufeff\0 \t\r\n"), missing


def _value(text: str, streamed: bool) -> Any:
    """The value of a body that is JSON or a stream of it; other text as it stands."""
    if not _STREAM.match(text):
        data = _loosely(text)
        return data[0] if isinstance(data, list) and len(data) == 1 else data
    data = _joined(list(_events(text))) or {}
    with contextlib.suppress(TypeError, AttributeError):  # where it is none of chunks
        data["choices"] = sorted(data.get("choices") or (), key=lambda choice: str(
            choice.get("index")).zfill(9))
        for it in data["choices"]:
            delta = it.pop("delta", None) or {}
            it.setdefault("message", dict({"content": None}, **delta))
        # [DONE] proves no end, but what nobody asked for would come again the same
        if not streamed and text.endswith("[DONE]") or all(
                choice.get("finish_reason") for choice in data["choices"]):
            return dict(data, object="chat.completion")
    return data if _trouble(data) else text


def _events(text: str) -> Iterator[Dict[str, Any]]:
    """The objects that a stream sends, up to where it breaks off."""
    found = re.finditer("(?m)^(event: ?error\n+)?data:(.*)", text.replace("\r", "\n"))
    for event in itertools.islice(found, 1 << 20):  # even an empty one costs time
        value = _loosely(event.group(2).strip())
        if event.group(1) and not (isinstance(value, dict) and value.get("error")):
            value = {"error": value}
        if isinstance(value, dict):
            yield value
        elif str(value).startswith("{"):
            return  # what follows would leave a hole


def _joined(parts: List[Any], name: str = "", pieces: bool = False) -> Any:
    """The value of a field of which a stream has sent parts: pieces of it, or news."""
    parts = [part for part in parts if part is not None]
    kind = type(parts[-1]) if parts else None
    parts = [part for part in parts if type(part) is kind]
    if kind is dict:
        fields: Dict[str, List[Any]] = {}
        for field, value in itertools.chain.from_iterable(map(dict.items, parts)):
            fields.setdefault(field, []).append(value)
        return {field: _joined(values, field, pieces or field in ("delta", "logprobs"))
                for field, values in fields.items() if field != "index" or not pieces}
    if kind is list and (pieces or name == "choices"):
        groups, ids = {}, {}  # type: Dict[Any, List[Any]], Dict[str, str]
        for number, item in enumerate(itertools.chain.from_iterable(parts)):
            group: Any = number
            if isinstance(item, dict) and {"index", "delta", "function"} & set(item):
                index = str(item.get("index", 0))  # one thing, until another id comes
                ids[index] = str(item.get("id") or ids.get(index))
                group = index, ids[index]
            groups.setdefault(group, []).append(item)
        return [_joined(group, "", pieces) for group in groups.values()]
    if kind is str and pieces:  # some send a call's name and id again with each part
        once = name in ("role", "id", "type", "name", "format")
        return "".join(dict.fromkeys(parts) if once else parts)
    return next(filter(None, reversed(parts)), parts[-1] if parts else None)


def _parse(text: str, depth: int = _MAX_DEPTH) -> Any:
    """The value of a JSON text, no matter who wrote it. Raises ValueError."""
    if text.count("[") + text.count("{") > depth:  # those outside of strings count
        outside = "".join(text.replace("\\\\", "").replace('\\"', "").split('"')[::2])
        levels = itertools.accumulate(1 if sign.group() in "[{" else -1
                                      for sign in re.finditer(r"[][{}]", outside))
        if any(level > depth for level in levels):
            raise ValueError("JSON nested more than %d deep" % depth)
    return _decode(text)


def _loosely(text: str) -> Any:
    """The value of a JSON text; any other text as it stands."""
    with contextlib.suppress(ValueError):
        return _parse(text)
    return text


def _number(digits: str) -> Any:
    if abs(float(digits)) == math.inf:  # first, as int() of a million digits is slow
        raise ValueError("%.20s is beyond all bounds" % digits)
    return int(digits) if digits.lstrip("-").isdigit() else float(digits)


_decode = json.JSONDecoder(parse_float=_number, parse_int=_number,
                           parse_constant=lambda name: None).decode  # NaN, Infinity


def _hider(*keys: str) -> Callable[[str], str]:
    """Takes keys out of a text, however JSON may write them, even twice over."""
    find = re.compile("|".join("".join(
        r"\\{0,8}(?:%s|(?i:u%04x))" % (re.escape(sign), ord(sign)) for sign in key)
        for key in keys if len(key) > 5) or "(?!)")  # "none" is a word of everyday
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
        """A proxy, if there is one: a CONNECT for https; for http it gets the URL."""
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
            "messages, not %s" % type(
                messages if prompt is fields else prompt).__name__)
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
        if name.title() in (
                "Host", "Connection", "Content-Length", "Transfer-Encoding"):
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
requests, {"prompt": ...}, {"messages": ...} or plain lines; output rows are
OpenAI Batch results. The output file is the checkpoint: the same command again
sends only what is missing or failed. TEXT and JSON may be @FILE. Exit status:
0 all answered, 1 some failed, 2 nothing sent, 3 stopped early (run it again),
128 + N ended by signal N."""

_TICK = 0.05       # seconds between two looks at signals and at a pipe
_DRAW = 0.25       # seconds between two drawings of the progress on a terminal,
_PLAIN = 30.0      # and between two lines of it elsewhere
_FRESH = 30.0      # seconds for which it shows the last attempt that failed
_GRACE = 5.0       # seconds that a stopped run leaves to what is in flight
_UNREACHED = 2     # times max_delay (a minute): no server was reached, the run ends
_ALIKE = 5         # rows of a model that fail alike, no answer between: it is in doubt
_PATIENCE = 50     # rows from elsewhere before failures that may pass end its part
_SHARED = frozenset({301, 302, 303, 307, 308, 401, 402, 403, 404, 405, 429, 503})
_ADD = os.O_CREAT | os.O_APPEND  # how files for results are opened
_canonical = json.JSONEncoder(sort_keys=True).encode
_DONE, _NEW, _FAILED = 0, 1, 2  # what is to be done with a row; _FAILED: once before


def main(argv: Optional[List[str]] = None) -> int:
    """The command line. Returns the exit status."""
    try:
        options = _options(argv)
        with contextlib.ExitStack() as stack:
            return _demo(stack) if options.demo else _Job(options, stack).run()
    except SystemExit as end:  # argparse's, or a signal's before anything was sent
        return int(end.code or 0)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (Error, OSError) as error:
        _say("cometlimit: error: %s" % error)
        return 2


def _say(text: str, end: str = "\n") -> None:
    """Write to stderr, if it can be: no server's words may steer the terminal."""
    text = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1]
                   for c in _in_our_words(text))
    try:
        sys.stderr.write(text + end)
        sys.stderr.flush()
    except (OSError, AttributeError):  # full or closed: to be tried no more
        sys.stderr = None


def _in_our_words(text: str) -> str:
    """What the library says of its options, as the command line calls them."""
    for pattern, words in (
            (r", or pass api_key=", ""), (r"Client\(model=.*\)", "-m MODEL"),
            (r"see Client\(.*\)", "see --help"), (r"\bheaders=", "--header"),
            (r"\btimeout(?= is a )|\btimeout= \(or deadline=\)", "--timeout"),
            (r"\b(max|allow|ca)_(concurrency|rate|retries|http|file)(=True|\b)",
             r"--\1-\2")):
        text = re.sub(pattern, words, text)
    return text


def _options(argv: Optional[List[str]]) -> Any:
    import argparse  # here, as the library's start is not to wait for it
    parser = argparse.ArgumentParser(
        "cometlimit", "cometlimit -m MODEL [PROMPT ... | -i FILE] [-o FILE] [--help]",
        (__doc__ or "").split("\n")[0], _EPILOG, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    _add_options(parser.add_argument)
    options, unknown = parser.parse_known_args(argv)
    if options.demo and not unknown:
        return options
    if options.prompts in ([], ["-"]) and options.input_file is None:
        options.prompts, options.input_file = [], "-"
    by_hand = options.input_file in (None, "-") and not options.output_file
    options.form = "text" if options.text else "array" if by_hand else "rows"
    try:
        _check(options, unknown, by_hand)
    except (ValueError, OSError) as fault:
        parser.error(_in_our_words(str(fault)))
    return options


def _add_options(add: Callable[..., Any]) -> None:
    many: Dict[str, Any] = {"action": "append", "default": [], "type": _utf8}
    add("prompts", nargs="*", type=_utf8, metavar="PROMPT", help="or -: lines on stdin")
    add("-m", "--model", type=_utf8, help="for rows that name none")
    add("-i", "--input-file", metavar="FILE", help="rows to ask; - is stdin")
    add("-o", "--output-file", metavar="FILE", help="rows of results; - is stdout")
    add("-c", "--max-concurrency", type=int, default=5, metavar="N", help="at once (5)")
    add("--max-rate", type=float, metavar="N", help="most requests a second")
    add("--max-retries", type=int, default=4, metavar="N", help="for each row (4)")
    add("--timeout", type=float, default=600.0, metavar="SEC", help="of one try (600)")
    add("--param", metavar="NAME=JSON", help="a field of each body", **many)
    add("--system", type=_utf8, metavar="TEXT", help="a system message for each prompt")
    add("--text", action="store_true", help="answers as bare text")
    add("--shard", default="1/1", metavar="I/N", help="of every N rows the I-th")
    add("--joblog", metavar="FILE", help="append a JSON line for every attempt")
    add("--max-tokens-total", type=int, metavar="N", help="stop after so many tokens")
    add("--skip-failed", action="store_true", help="leave rows that failed for good")
    add("--dry-run", action="store_true", help="check the input, send nothing")
    add("--base-url", metavar="URL", help="else COMETAPI_BASE_URL, else CometAPI's")
    add("--header", dest="headers", metavar="'NAME: VALUE'", **many)
    add("--allow-http", action="store_true", help="http to any host: it shows the key")
    add("--ca-file", metavar="FILE", help="further certificates to trust (PEM)")
    add("-q", "--quiet", action="store_true", help="no progress, no summary")
    add("--demo", action="store_true", help="see it find the limit of its own server")
    add("--version", action="version", version="%(prog)s " + __version__)


def _utf8(word: str) -> str:
    """An argument as it was typed: 3.6 in the C locale cannot read UTF-8."""
    with contextlib.suppress(UnicodeError):
        return os.fsencode(word).decode("utf-8")
    return word


def _check(options: Any, unknown: List[str], by_hand: bool) -> None:
    files = options.input_file, options.output_file, options.joblog
    for is_wrong, words in (
            (unknown, "unknown: " + " ".join(  # without values: one may be a key
                word.split("=")[0] for word in unknown)),
            (options.prompts and files[0], "give either prompts or -i"),
            (files[0] == "-" and (sys.stdin is None or sys.stdin.isatty()),
             "nothing to ask: give prompts, -i FILE or lines on stdin"),
            (options.model == "" or by_hand and options.model is None,
             "name a model: -m MODEL"),
            (options.text and files[1], "--text goes to stdout, not to -o"),
            ("" in files, "-i, -o and --joblog take the name of a file")):
        if is_wrong:
            raise ValueError(words)
    options.system = options.system and _or_file(options.system)
    options.param = {name: _json_or_word(_or_file(text)) for name, text in (
        _pair(word, "=", "--param is NAME=JSON") for word in options.param)}
    _payload("x", dict({"model": "x"}, **options.param))
    options.headers = dict(_pair(line, ":", "--header is NAME: VALUE")
                           for line in options.headers)
    at, shards = map(int, _pair(options.shard, "/", "--shard is I/N"))
    if not 0 < at <= shards:
        raise ValueError("--shard is I/N, with I from 1 to N")
    options.shard = range(at - 1, sys.maxsize, shards)


def _or_file(value: str) -> str:
    """A text, or what the file of @FILE holds."""
    if value[:1] != "@":
        return value
    with open(value[1:].encode(), encoding="utf-8-sig") as file:
        return file.read().rstrip("\r\n")


def _pair(word: str, sign: str, form: str) -> Tuple[str, str]:
    name, found, value = map(str.strip, word.partition(sign))
    if not (name and found):
        raise ValueError("%s, not %s" % (form, name))
    return name, value


def _json_or_word(text: str) -> Any:
    """A value of JSON; what cannot be meant as such is a text."""
    value = _loosely(text)
    if value in (text, None) and re.match(
            r"[\[{\"']|(?i:[-+.]?\d[\d.,_]*|true|false|none|nan|-?inf\w*|)$", text):
        raise ValueError("a value of --param is no JSON: " + text)
    return value


# Rows

_NO_ROWS = tuple((re.compile(pattern, re.S).match, what) for pattern, what in (
    (br"\x1f\x8b|PK\x03\x04|\xfd7zXZ|BZh\d|\x28\xb5\x2f\xfd|PAR1", "packed: unpack it"),
    (br"\xff\xfe|\xfe\xff|.*\0", "UTF-16 or UTF-32: save it as UTF-8"),
    (br'[\[{]$|\[\s*\{|\[\s*".*[",\]]$', "a JSON document: give each row a line")))
# A line of CSV with a field in quotes; one alone is a prompt.
_is_csv = re.compile(br'(?=.*")("(""|[^"])*"|[^",]+)(,("(""|[^"])*"|[^",]*))*$').match


class _Input:
    """The lines with rows: of a file, which can be read again, a pipe, or prompts.

    Of a file, the rows that were there at the start are asked: those that are appended
    later are left to the next run.
    """

    def __init__(self, fd: int, prompts: List[str]) -> None:
        self.fd, self.prompts, self.is_open = fd, prompts, True
        self.is_file = os.path.isfile(fd)
        self.is_pipe = not (self.is_file or prompts)
        self.is_json = False
        self.index = array.array("q")  # of a file: number, start, size of rows' lines
        self.lines: Dict[int, Tuple[int, bytes]] = {}  # else: rows not asked yet

    def scan(self, shard: range) -> Iterator[Optional[int]]:
        """The shard's rows, from 0; None where a pipe has nothing to read yet."""
        start = os.lseek(self.fd, 0, os.SEEK_CUR) if self.is_file else 0
        row = number = count = quoted = 0
        for line in self._lines():
            if line is None:
                yield None
                continue
            text, number = _strip(line), number + 1
            for matches, what in _NO_ROWS if text and not count else ():
                if matches(text):
                    raise ConfigurationError("the input is " + what)
            self.is_json = self.is_json or not count and text[:1] == b"{"
            quoted += text[:1] != b"{" and bool(_is_csv(text))
            if quoted > 1:
                raise ConfigurationError('the input is CSV: write {"prompt": ...} rows')
            if text and count in shard:
                if self.is_file:
                    self.index.extend((number, start, len(line)))
                else:
                    self.lines[row] = number, text
                yield row
                row += 1
            count, start = count + bool(text), start + len(line)
        self.is_open = False

    def _lines(self) -> Iterator[Optional[bytes]]:
        """Lines as bytes: only \\n ends one, others may stand inside of strings."""
        if self.is_file:
            with open(self.fd, "rb", closefd=False) as file:
                yield from file
        for prompt in self.prompts:
            yield json.dumps({"prompt": prompt}).encode()
        rest = bytearray()
        while self.is_pipe:
            if not select.select([self.fd], [], [], 0)[0]:
                yield None
                continue
            data = os.read(self.fd, 1 << 16)
            rest += data
            if b"\n" in data or not data:
                *lines, rest = rest.split(b"\n")
                yield from map(bytes, lines)
            if not data:
                yield bytes(rest)
                return

    def get(self, row: int) -> Tuple[int, bytes]:
        """The number and the text of a row's line."""
        if not self.is_file:
            return self.lines[row]
        number, start, size = self.index[3 * row:3 * row + 3]
        line = os.pread(self.fd, size, start)
        if len(line) < size:
            raise OSError("the input was cut short meanwhile")
        return number, _strip(line)


def _strip(line: bytes) -> bytes:
    line = line[3:] if line.startswith(b"\xef\xbb\xbf") else line
    return line.strip(b" \t\r\n\f\v\0")


class _Row(NamedTuple):
    """A question of the input."""
    n: int     # its place among the rows of the shard
    id: str    # its custom_id, else its line
    line: int
    body: Dict[str, Any]
    mark: str  # of all that is asked: another one is another question
    problem: Optional[ConfigurationError]  # why it cannot be asked


def _row(source: _Input, n: int, options: Any) -> _Row:
    (number, line), body, problem = source.get(n), {}, None
    name = "line-%d" % number
    try:
        text = line.decode("utf-8")
        value = _parse(text) if text[0] == "{" else (
            _loosely(text) if source.is_json else text)
        value = {"prompt": text} if value is text else value
        if not isinstance(value, dict):
            raise ValueError("a row is an object or a plain prompt")
        value = {field: value[field] for field in value if value[field] is not None}
        own = value.get("custom_id", name if "body" in value else value.get("id", name))
        if isinstance(own, bool) or not isinstance(own, (str, int)):
            raise ConfigurationError("a custom_id is a text or a whole number, not "
                                     + repr(own), code="invalid_input")
        name = str(own)
        body = _body(value, options)
    except ConfigurationError as fault:
        problem = fault
    except ValueError as fault:
        problem = ConfigurationError("line %d cannot be read: %s" % (number, fault),
                                     code="invalid_json_line")
    return _Row(n, name, number, body, _digest(body), problem)


def _body(value: Dict[str, Any], options: Any) -> Dict[str, Any]:
    """The body of the request, from any form of row. Raises ConfigurationError."""
    url, given = str(value.get("url", "/chat/completions")), value.get("body", value)
    if value.get("method", "POST") != "POST" or not url.endswith("/chat/completions"):
        raise ConfigurationError("only POST to /v1/chat/completions can be asked")
    if not isinstance(given, dict):
        raise ConfigurationError("the body of a row is an object")
    body = dict({"model": options.model}, **options.param)
    body.update((name, field) for name, field in given.items() if field is not None
                and name not in ("custom_id", "id", "method", "url"))
    if "prompt" in body and "messages" in body:
        raise ConfigurationError("a row has either a prompt or messages")
    if "prompt" in body:
        prompt = body.pop("prompt")
        roles = [("system", options.system), ("user", prompt)][not options.system:]
        body["messages"] = prompt if not isinstance(prompt, str) else [
            {"role": role, "content": text} for role, text in roles]
    _payload(body, {})
    last = body["messages"][-1]
    if last.get("role") == "user" and not str(last.get("content")).strip():
        raise ConfigurationError("the prompt is empty", code="invalid_input")
    return body


def _digest(value: Any) -> str:
    """64 bits of a JSON value; hashlib may refuse to work where FIPS rules."""
    data = _canonical(value).encode()
    return "%08x%08x" % (zlib.crc32(data), zlib.crc32(data[::-1]))


def _result(row: _Row, outcome: Outcome) -> bytes:
    """The OpenAI Batch output line. A failure stands in both the places where readers
    look for it: https://github.com/openai/openai-openapi/issues/302"""
    name, body = "batch_req_%s_%s" % (_digest(row.id), row.mark), outcome.body
    status = getattr(outcome, "status_code", 200)
    error: Optional[Dict[str, Any]] = None
    if isinstance(outcome, Error):
        error = {"code": _code(outcome), "message": str(outcome)}
        if isinstance(outcome, ConfigurationError):
            error["line"] = row.line
        if not isinstance(body, dict):
            body = {"error": {"message": body, "type": None, "param": None,
                              "code": None}}
    response = {"status_code": status, "body": body,
                "request_id": outcome.request_id or name}
    return json.dumps({"id": name, "custom_id": row.id, "error": error,
                       "response": response if status else None}).encode() + b"\n"


# Results


def _write(write: Callable[[bytes], int], data: bytes) -> None:
    """All of it or an OSError: file objects keep what a full disk refused for later."""
    while data:
        data = data[write(data):]


# How a pipe gets results: before the first, between two, at the end; for a lack of one.
_FRAMES = {"array": (b"[", b",\n ", b"]\n", b"null"), "text": (b"",) * 4,
           "rows": (b"",) * 4}


class _Stream:
    """Results to a pipe, in the order of the rows: what comes early is held back."""
    skipped, found = (), ()  # which a checkpoint has

    def __init__(self, write: Callable[[bytes], int], form: str) -> None:
        self.write, self.form = functools.partial(_write, write), form
        self.early: Dict[int, bytes] = {}
        self.written = 0

    def put(self, n: int, row: Optional[_Row], outcome: Optional[Outcome]) -> None:
        """Take a row's result; None: it is left without one."""
        start, comma, _, data = _FRAMES[self.form]
        text = getattr(outcome, "text", None)
        if row and outcome and self.form == "rows":
            data = _result(row, outcome)
        elif text is not None:
            data = (text + "\n" if self.form == "text" else json.dumps(
                text, ensure_ascii=False)).encode("utf-8", "backslashreplace")
        self.early[n] = data
        while self.written in self.early:
            self.write(comma if self.written else start)
            self.write(self.early.pop(self.written))
            self.written += 1

    def meet(self, row: _Row) -> Tuple[int, str]:
        return _NEW, ""

    def look(self) -> None:
        """A pipe needs no care."""

    begin = look

    def close(self, rows: int) -> None:
        start, _, end, _ = _FRAMES[self.form]
        for n in set(range(self.written, rows)) - set(self.early):  # after a stop
            self.put(n, None, None)
        self.write(end if rows else start + end)


class _Checkpoint:
    """Results to a file, which is all that a resumed run needs.

    A result is appended, in one piece, as soon as it is there, whatever is still open
    before it: a kill costs none that was received. close() puts the rows into the order
    of the input and leaves the last of each, in a copy that takes the file's place.
    """
    written = sys.maxsize  # no row waits for those before it

    def __init__(self, fd: int, path: str, skip_failed: bool) -> None:
        self.fd, self.path, self.skip_failed = fd, path, skip_failed
        self.places = array.array("q")  # offset + 1 of each row's line; 0: it has none
        # By id, of rows not met yet: the same << 64 | the mark. Negative: it failed.
        self.found: Dict[str, int] = {}  # Tuples would take 100 bytes more for each.
        self.skipped: Set[str] = set()   # ids of failures that are to stay
        self.lines = self.end = self.tokens = 0
        self._lock()
        self._load()

    def _lock(self) -> None:
        import fcntl
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not self._is_there():
                raise BlockingIOError  # by a run that has just ended
        except BlockingIOError:
            raise ConfigurationError("another run writes to %s" % self.path) from None
        except OSError as fault:
            _say("cometlimit: %s cannot be locked (%s): let no other run write to it"
                 % (self.path, fault))

    def _is_there(self) -> bool:
        with contextlib.suppress(OSError):
            return os.path.samefile(self.fd, self.path)
        return False

    def _load(self) -> None:
        bad, start = 0, b'{"id": "batch_req_'
        with open(self.path, "rb") as lines:
            for line in lines:
                try:
                    text = line.decode("utf-8").lstrip("\ufeff")
                    self._learn(_parse(text, 2 * _MAX_DEPTH))
                except (ValueError, LookupError, TypeError, AttributeError):
                    if not line.endswith(b"\n") and (
                            self.found or start.startswith(line[:len(start)])):
                        break  # torn by a kill: the next row takes its place
                    bad += 1
                self.lines, self.end = self.lines + 1, self.end + len(line)
        if bad:
            _say("cometlimit: %d lines of %s are no results" % (bad, self.path))
            if not self.found:
                raise ConfigurationError("%s holds something else: it is left as it is"
                                         % self.path)

    def _learn(self, result: Any) -> None:
        """Take note of an output line, whoever wrote it."""
        name, place = str(result["custom_id"]), (self.end + 1) << 64
        response, error = result["response"], result.get("error")
        response = response if isinstance(response, dict) else {}
        status, body = response.get("status_code"), response.get("body")
        self.skipped.discard(name)
        if error is None and status in range(200, 300) and (
                isinstance(body, dict) and body and not body.get("error")):
            found = re.match("batch_req_[0-9a-f]{16}(?:_([0-9a-f]{16}))?$",
                             str(result.get("id")))
            # Rows of other programs have no mark; version 1.0 made marks that fit none.
            self.found[name] = place | int(found and (found.group(1) or "1") or "0", 16)
            self.tokens += sum(_tokens(body))
        elif self.found.get(name, 0) <= 0:
            self.found[name] = -place
            code = error.get("code") if isinstance(error, dict) else None
            may_pass = status in RETRYABLE | {401, 402} if status else (
                not str(code).startswith("invalid_"))
            if self.skip_failed and not may_pass:
                self.skipped.add(name)

    def meet(self, row: _Row) -> Tuple[int, str]:
        """What is to be done with the input's next row, and what is wrong with it."""
        found = self.found.get(row.id, 0)
        place, mark = divmod(abs(found), 1 << 64)
        self.places.append(0)
        if mark not in (0, int(row.mark, 16)):
            return _NEW, ("%s is of another input or other settings: there, %r asked "
                          "something else. Name another -o, or delete such rows" % (
                              self.path, row.id))
        self.places[-1] = place
        self.found.pop(row.id, None)
        is_kept = found > 0 or row.id in self.skipped
        return _DONE if is_kept else _FAILED if found else _NEW, ""

    def begin(self) -> None:
        """Make the end of the file ready for rows: half a row is no row."""
        os.ftruncate(self.fd, self.end)
        if self.end and os.pread(self.fd, 1, self.end - 1) != b"\n":
            self.end += os.write(self.fd, b"\n")

    def put(self, n: int, row: Optional[_Row], outcome: Optional[Outcome]) -> None:
        if row is None or outcome is None:
            return  # its line stays as it is
        line = _result(row, outcome)
        try:
            _write(functools.partial(os.write, self.fd), line)
        except OSError:  # a full disk takes half a row
            os.ftruncate(self.fd, self.end)
            raise
        self.places[n] = self.end + 1
        self.lines, self.end = self.lines + 1, self.end + len(line)

    def look(self) -> None:
        """See that what was written is safe, and still there."""
        os.fsync(self.fd)
        if os.fstat(self.fd).st_size != self.end:
            raise OSError("another program has written to %s" % self.path)
        if not self._is_there():
            _say("cometlimit: %s was removed or replaced: it is written back"
                 % self.path)
            self._replace(None)

    def close(self, _: int) -> None:
        self.look()
        order = list(filter(None, self.places))
        order += sorted(abs(found) >> 64 for found in self.found.values())
        if len(order) != self.lines or order != sorted(order):
            try:
                self._replace(order)
            except OSError as fault:
                _say("cometlimit: %s is whole, but not in the input's order: %s"
                     % (self.path, fault))

    def _replace(self, places: Optional[List[int]]) -> None:
        """Put a copy with these rows (None: all) into the file's place: with its mode
        and, under its descriptor, its lock."""
        draft = self.path + ".sorted"
        fd = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        try:
            with open(self.fd, "rb", closefd=False) as rows:
                rows.seek(0)
                for line in rows if places is None else (
                        (rows.seek(place - 1), rows.readline())[1] for place in places):
                    _write(functools.partial(os.write, fd), line)
            os.fchmod(fd, os.fstat(self.fd).st_mode & 0o777)
            os.fsync(fd)
            os.replace(draft, self.path)
            os.dup2(fd, self.fd, inheritable=False)
        except OSError:
            os.unlink(draft)
            raise
        finally:
            os.close(fd)
        self._lock()


# A run


class _Screen:
    """What becomes of the rows: counted, and shown on stderr."""

    def __init__(self, options: Any) -> None:
        self.options = options
        self.total: Optional[int] = None  # rows, if that is known beforehand
        self.kept = self.answers = self.failures = self.tokens = 0
        self.errors: Dict[str, List[Any]] = {}  # by code: number, a message, ten ids
        self.trouble, self.trouble_at = "", -math.inf  # the last attempt that failed
        self.is_reached = False
        self.began = time.monotonic()
        self.past = collections.deque([(self.began, 0)])  # what was done by when
        answers = options.output_file in (None, "-") and sys.stdout
        self.bar = not (options.quiet or answers and answers.isatty()) and (
            sys.stderr and sys.stderr.isatty())  # a line that is drawn again and again
        self.due = self.began + (0.0 if self.bar else _PLAIN)

    def attempt(self, record: Record, client: Client) -> None:
        self.tokens += record.prompt_tokens + record.completion_tokens
        self.is_reached |= record.status is not None or record.error == "timeout"
        if record.error is not None:
            self.trouble_at = time.monotonic()
            if not self.trouble:
                self.due = min(self.due, self.trouble_at + 1.0)  # the first comes early
            self.trouble = "%s %s" % (record.status or "", record.error)
            if record.error.startswith("connect"):
                self.trouble = "no connection to " + (
                    urllib.parse.urlsplit(client.base_url).netloc)

    def count(self, row: _Row, outcome: Outcome) -> None:
        self.answers += isinstance(outcome, Completion)
        if isinstance(outcome, Error):
            self.failures += 1
            kind = self.errors.setdefault(_code(outcome), [0, str(outcome)])
            kind[0] += 1
            kind += [row.id] * (kind[0] <= 10)
            if self.options.form != "rows":
                _say("cometlimit: %s: %s" % (row.id, outcome))

    def draw(self, client: Client, stopping: str) -> None:
        """Show how the run goes, if that is due."""
        now = time.monotonic()
        if now >= self.due and not self.options.quiet:
            self.due = now + (_DRAW if self.bar else _PLAIN)
            width = self.bar and os.get_terminal_size(sys.stderr.fileno()).columns or 80
            text = stopping or self._progress(client, now, width)
            _say(text[:width - 1], "\x1b[K\r" if self.bar else "\n")

    def _progress(self, client: Client, now: float, width: int) -> str:
        done, total = self.answers + self.failures, self.total
        stats = client.metrics.values()
        self.past.append((now, done))
        while self.past[0][0] < now - 60.0:
            self.past.popleft()
        rate = (done - self.past[0][1]) / max(0.001, now - self.past[0][0])
        left = (total - self.kept - done) / rate if total and rate else 0.0
        chance = max([100 * min(one.chance, sum(
            one.statuses[status] for status in (429, 503, 529))) // max(1, one.requests)
            for one in stats] or [0])
        parts: List[Any] = [part for part in (  # the last ones give way on a narrow one
            "%d%s done" % (done + self.kept, "/%d" % total if total else ""),
            self.failures and "%d failed" % self.failures,
            now < self.trouble_at + _FRESH and self.trouble,
            left and "%d:%02d:%02d left" % (left // 3600, left // 60 % 60, left % 60),
            "%.1f/s" % rate, *["limit %.3g/s" % one.rate for one in stats if one.rate],
            *["window %d" % one.window for one in stats if one.window],
            chance and "%d %% refused by chance" % chance) if part]
        while len(parts) > 3 and len(", ".join(parts)) >= width:
            parts.pop()
        return ", ".join(parts)

    def summary(self, client: Client, sink: Any, left: int) -> Iterator[str]:
        stats = client.metrics.values()
        yield str(client.metrics)
        for code, (count, message, *ids) in sorted(self.errors.items()):
            if self.options.form == "rows":  # else they were told at once
                yield textwrap.fill("%d x %s (%s%s): %.300s" % (
                    count, code, ", ".join(ids), ", ..." * (count > 10), message),
                    80, subsequent_indent="  ")
        odd = sum(one.empty for one in stats), sum(one.cut_off for one in stats)
        if any(odd):
            yield "answers without text: %d; cut off by a length limit: %d" % odd
        if isinstance(sink, _Checkpoint):
            yield "tokens: %d in this run, %d in all of %s" % (
                self.tokens, sink.tokens + self.tokens, sink.path)
        yield "%d answered, %d failed, %d kept, %d left, %.1f s" % (
            self.answers, self.failures, self.kept, left, time.monotonic() - self.began)


class _Job:
    """One run: rows in, results out.

    The main thread alone reads, writes and decides; the client's threads only put what
    happened into `events`.
    """

    def __init__(self, options: Any, stack: contextlib.ExitStack) -> None:
        self.options, self.stack, self.screen = options, stack, _Screen(options)
        self.events: Any = queue.Queue()  # what happened: its method, and the argument
        self.calls: Dict[Future, _Row] = {}  # under way
        self.files: Dict[str, int] = {}   # that are open, by what they are for
        self.ids: Set[str] = set()
        self.todo, self.models = bytearray(), []  # type: bytearray, List[str]  # by row
        self.cursors = [0, 0, 0]          # where to look for the next row, by state
        self.doubt, self.signal = _Doubt(), 0
        self.reason, self.until = "", math.inf  # why, and when, it ends early
        self.looked, self.bad, self.size = 0.0, 0, 0
        self.is_sending = self.is_lost = False
        self.joblog: Optional[int] = None
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if threading.current_thread() is threading.main_thread() and (
                    signal.getsignal(number) is not signal.SIG_IGN):  # as under nohup
                stack.callback(signal.signal, number,
                               signal.signal(number, self._on_signal))
        self.client = Client(
            api_key="none" if options.dry_run else None,
            on_record=lambda record: self.events.put((self._log, record)),
            **{name: vars(options)[name] for name in _OPTIONS & set(vars(options))})
        stack.callback(self.client.close)
        source = options.input_file
        self.input = _Input(-1 if source is None else self._open(
            "input", sys.stdin.fileno() if source == "-" else source, os.O_RDONLY),
            options.prompts)
        self.rows = self.input.scan(options.shard)
        self.sink = self._output(options.output_file or "-")

    def run(self) -> int:
        """Returns the exit status. Raises Error or OSError before anything is sent."""
        if self.options.dry_run or not self.input.is_pipe:
            self._survey()
        if self.options.dry_run:
            models = sorted(collections.Counter(self.models).items())
            _say("%d rows, %d bad; by model: %s; %d answered already; %d characters" % (
                len(self.todo), self.bad, ", ".join("%s x %d" % one for one in models),
                self.screen.kept, self.size))
            return int(self.bad > 0)
        if self.options.joblog:
            self.joblog = self._open("job log", self.options.joblog, os.O_WRONLY | _ADD)
        self.is_sending = True
        try:
            self.sink.begin()
            while self._fill() or self.calls or not self.events.empty():
                with contextlib.suppress(queue.Empty):
                    handle, what = self.events.get(timeout=_TICK)
                    handle(what)
                self._look()
            self.sink.close(len(self.todo))
        except (OSError, ConfigurationError) as fault:  # no result can be written
            if not self.todo:
                raise  # nothing was sent
            self.is_lost = True
            self.reason = "the results cannot be written: %s" % fault
            if isinstance(fault, BrokenPipeError):
                self.signal = signal.SIGPIPE  # as `head` leaves: quietly
        return self._end()

    def _on_signal(self, number: int, _: Any) -> None:
        if not self.is_sending:
            sys.exit(128 + number)
        if self.signal:
            os._exit(128 + number)  # the second one: no row waits to be written
        self.signal = number

    def _output(self, path: str) -> Any:
        form = self.options.form
        if self.options.dry_run and not os.path.isfile(path):
            return _Stream(len, form)
        if path == "-":
            if sys.stdout is None:
                raise ConfigurationError("stdout is closed: answers would go nowhere")
            sys.stdout.flush()
            with contextlib.suppress(io.UnsupportedOperation):  # a stream of Python's
                self._open("output", sys.stdout.fileno(), 0)
            file = sys.stdout.buffer
            return _Stream(getattr(file, "raw", file).write, form)
        is_file = os.path.isfile(path) or not os.path.exists(path)
        fd = self._open("output", path, _ADD | (os.O_RDWR if is_file else os.O_WRONLY))
        return _Checkpoint(fd, os.path.realpath(path), self.options.skip_failed) if (
            is_file) else _Stream(functools.partial(os.write, fd), form)

    def _open(self, role: str, file: Union[int, str], mode: int) -> int:
        """A descriptor for a file that has no other role."""
        for other, fd in self.files.items():
            if os.path.isfile(file) and os.path.samefile(file, fd):
                raise ConfigurationError("the %s is the %s" % (role, other))
        if isinstance(file, str):
            file = os.open(file, mode, 0o666)
            self.stack.callback(os.close, file)
        self.files[role] = file
        return file

    def _survey(self) -> None:
        """Read the whole input before anything is sent."""
        while self.input.is_open:
            self._read(50000)
            if self.screen.bar:
                _say("%d rows read" % len(self.todo), "\x1b[K\r")
            time.sleep(_TICK * self.input.is_pipe)
        if self.sink.found:
            raise ConfigurationError(
                "%s is of another input: no row asks for %r, nor for %d more" % (
                    self.sink.path, min(self.sink.found), len(self.sink.found) - 1))
        self.screen.total = len(self.todo)

    def _read(self, most: int) -> None:
        """Take note of the next rows, so many at most, as far as they are there."""
        for n in itertools.islice(self.rows, max(0, most)):
            if n is None:
                return
            row = _row(self.input, n, self.options)
            state, wrong = self.sink.meet(row)
            if row.id in self.ids:
                wrong = "the custom_id %r stands twice" % row.id
            if wrong:
                row = row._replace(
                    problem=ConfigurationError(wrong, code="invalid_input"))
            self.ids.add(row.id)
            self.models.append(sys.intern(str(row.body.get("model"))))
            self.todo.append(state)
            self.screen.kept += state == _DONE
            self.bad += row.problem is not None
            if self.options.dry_run:
                self.size += len(str(row.body.get("messages", "")))
                if row.problem:
                    _say("%s: %s" % (row.id, row.problem))
            elif row.problem and self.input.is_pipe:  # others have been sent
                self._ask(row)
            elif row.problem and row.problem.code == "invalid_input":
                raise ConfigurationError("%s: %s" % (row.id, row.problem))

    def _fill(self) -> bool:
        """Ask rows while there is room. Returns whether a pipe may have more."""
        most = self.options.max_concurrency
        ahead, room = _AHEAD * most, 2 * most if self.screen.answers else most
        try:
            while not self.reason and len(self.calls) < room:
                if self.input.is_open:
                    self._read(ahead - max(self.todo.count(_NEW, self.cursors[_NEW]),
                                           len(self.todo) - self.sink.written))
                n = self._next(ahead)
                if n is None:
                    break
                self._ask(_row(self.input, n, self.options))
        except (OSError, ConfigurationError) as fault:
            if not self.todo:
                raise  # nothing was sent
            self._stop("the input cannot be read on: %s" % fault)
        return self.input.is_open and not self.reason

    def _next(self, most: int) -> Optional[int]:
        """The next row to ask, if it may be asked now: new ones before those that once
        failed; of models in doubt only samples."""
        n, models = self.doubt.sample(self.todo, self.models), self.doubt.models
        if n is not None:
            return n
        for state in (_NEW,) if self.input.is_open else (_NEW, _FAILED):
            n = self.todo.find(state, self.cursors[state])
            while n >= 0 and self.models[n] in models:
                if models[self.models[n]]:
                    self.todo[n] = _DONE
                    self.sink.put(n, None, None)
                n = self.todo.find(state, n + 1)
            self.cursors[state] = n if n >= 0 else len(self.todo)
            if n >= 0:
                return n if n < self.sink.written + most else None
        return None

    def _ask(self, row: _Row) -> None:
        self.todo[row.n] = _DONE
        self.input.lines.pop(row.n, None)
        try:
            if row.problem is not None:
                raise row.problem
            call = self.client.submit(row.body, tag=row.id)
        except Error as problem:
            call = Future()
            call.set_exception(problem)
        self.calls[call] = row
        call.add_done_callback(lambda call: self.events.put((self._finish, call)))

    def _finish(self, call: Future) -> None:
        row, doubt = self.calls.pop(call), self.doubt
        outcome: Any = call.exception() or call.result()
        failed = isinstance(outcome, Error)
        if failed and re.search(r"; come back at \d\d:\d\d$", str(outcome)):
            self._stop(str(outcome))
        if doubt.learn(row.n, self.models[row.n], outcome, self.screen.is_reached):
            self.cursors = [0, 0, 0]  # rows that were passed over are looked at again
            gone = doubt.gone()
            if gone and (len(gone) == len(set(self.models)) or (
                    len(gone) >= 3 and not self.screen.answers)):
                self._stop(gone[-1])
        if not (self.reason and failed and (
                outcome.retryable or outcome.code == "cancelled")):
            self.screen.count(row, outcome)  # others are left to the next run
            self.sink.put(row.n, row, outcome)

    def _log(self, record: Record) -> None:
        self.screen.attempt(record, self.client)
        most = self.options.max_tokens_total
        if most is not None and self.screen.tokens > most:
            self._stop("%d tokens were used" % self.screen.tokens)
        if self.joblog:
            try:
                _write(functools.partial(os.write, self.joblog),
                       json.dumps(record._asdict()).encode() + b"\n")
            except OSError as fault:  # no reason to lose answers
                _say("cometlimit: the job log cannot be written: %s" % fault)
                self.joblog = None

    def _stop(self, reason: str) -> None:
        """Send nothing more. What is in flight has some seconds left."""
        if not self.reason:
            self.reason, self.until = reason, time.monotonic() + _GRACE
            self.client.stop()
            self.screen.due = time.monotonic() + _TICK

    def _look(self) -> None:
        """Do what is due by the clock."""
        now, screen = time.monotonic(), self.screen
        if self.signal:
            self._stop(signal.Signals(self.signal).name)
        if screen.trouble and not screen.is_reached and (
                now > screen.began + _UNREACHED * self.client.max_delay):
            self._stop("the server was never reached: " + screen.trouble)
        if now > self.until:
            self.until = math.inf
            self.client.close()
        if now > self.looked + 1.0:
            self.looked = now
            self.sink.look()
        screen.draw(self.client, self.reason and "stopping: %d in flight, %.0f s" % (
            len(self.calls), min(_GRACE, max(0.0, self.until - now))))

    def _end(self) -> int:
        """Say what became of the run, and return its exit status."""
        screen, is_told = self.screen, not self.options.quiet
        left = len(self.todo) - screen.kept - screen.answers - screen.failures
        is_early = bool(self.reason and (self.is_lost or left or self.input.is_open))
        if screen.bar:
            _say("", "\x1b[K\r")
        if self.signal == signal.SIGPIPE:
            return 128 + self.signal
        if is_told and (self.options.form == "rows" or screen.total != 1):
            _say("\n".join(screen.summary(self.client, self.sink, left)))
        for reason in [self.reason] if is_early else self.doubt.gone():
            _say("cometlimit: stopped: " + reason)
        is_lacking = is_early or left or screen.failures
        if is_told and is_lacking and isinstance(self.sink, _Checkpoint):
            command = " ".join(map(shlex.quote, [sys.executable] + sys.argv))
            _say("to go on: " + (  # headers may be secret
                "the same command" if self.options.headers else command))
        if self.signal:
            return 128 + self.signal
        return 3 if is_early else 1 if is_lacking or self.sink.skipped else 0


class _Doubt:
    """Whether failures are a row's own matter, or the model's, account's or server's.

    A model is in doubt once five of its rows failed alike, no answer between, for a
    reason that rows may share. Then only samples from all over the input are asked.
    When these fail too, five or, if such failures may pass, fifty, its rows are left.
    """

    def __init__(self) -> None:
        # Failures since a model's last answer: by code, and whether it was a sample.
        self.alike: Dict[str, Dict[Tuple[str, bool], int]] = {}
        self.models: Dict[str, str] = {}  # in doubt; why its rows are left, if they are
        self.samples: Set[int] = set()    # rows that are under way
        self.spot = 0

    def gone(self) -> List[str]:
        """Why rows are left, for each model whose rows are."""
        return list(filter(None, self.models.values()))

    def learn(self, n: int, model: str, outcome: Outcome, is_reached: bool) -> bool:
        """Returns whether rows that were passed over may be asked or left now."""
        is_sample = n in self.samples
        self.samples.discard(n)
        if isinstance(outcome, Completion):
            self.alike.pop(model, None)
            return self.models.pop(model, None) is not None
        if not (outcome.retryable or outcome.status_code in _SHARED
                or isinstance(outcome, (APIConnectionError, APIResponseError))):
            return False
        alike = self.alike.setdefault(model, collections.Counter())
        key = _code(outcome), is_sample
        alike[key] += 1
        may_pass = is_sample and outcome.retryable and is_reached
        if alike[key] < (_PATIENCE if may_pass else _ALIKE):
            return False
        reason = "rows of %s fail alike: %s" % (model, outcome)
        self.models[model] = self.models.get(model) or (reason if is_sample else "")
        return is_sample

    def sample(self, todo: bytearray, models: List[str]) -> Optional[int]:
        """A row, far from the last one, of a model in doubt; None: there are enough."""
        for model, reason in list(self.models.items()):
            if not reason and len(self.samples) < _ALIKE:
                self.spot = (self.spot + len(todo) * 61 // 99 + 1) % len(todo)
                for n in itertools.chain(range(self.spot, len(todo)), range(self.spot)):
                    if todo[n] and models[n] == model:
                        self.samples.add(n)
                        return n
                del self.models[model]  # it has none left
        return None


def _demo(stack: contextlib.ExitStack) -> int:
    """Prompts to a rate-limited server in this process: a line a second, the sum."""
    rate, began = 8, time.monotonic()
    server = _demo_server(rate)
    stack.callback(server.server_close)
    stack.callback(server.shutdown)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    print("40 prompts, 20 at once, to a server that allows %d requests a second" % rate,
          flush=True)
    client = Client(api_key="none", model="demo-model", max_concurrency=20,
                    base_url="http://127.0.0.1:%d/v1" % server.server_address[1])
    stack.callback(client.close)
    calls = [client.submit("Hello %d." % n) for n in range(40)]
    while not all(call.done() for call in calls):
        time.sleep(1.0)
        for stats in client.metrics.values():
            print("%.0f s  %d answered, %d refused%s" % (
                time.monotonic() - began, stats.answers, stats.statuses[429],
                "  limit %.3g/s" % stats.rate if stats.rate else ""), flush=True)
    lost = sum(call.exception() is not None for call in calls)
    print("%s\n%d answered, %d lost, %.1f s" % (
        client.metrics, 40 - lost, lost, time.monotonic() - began))
    return int(lost > 0)


def _demo_server(rate: int) -> Any:
    import socketserver
    lock, full = threading.Lock(), [0.0]  # when the bucket is full again
    answer = (b'{"choices": [{"message": {"content": "Hello."}}], '
              b'"usage": {"prompt_tokens": 6, "completion_tokens": 8}}')

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while self.rfile.readline():
                head = http.client.parse_headers(self.rfile)
                self.rfile.read(int(head["content-length"]))
                with lock:
                    soonest = max(full[0], time.monotonic()) + 1 / rate
                    is_allowed = soonest <= time.monotonic() + 1.0
                    full[0] = soonest if is_allowed else full[0]
                time.sleep(0.3 * is_allowed)
                self.wfile.write(b"HTTP/1.1 %d -\r\nContent-Length: %d\r\n\r\n%s" % (
                    200 if is_allowed else 429, len(answer), answer))

    return socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)


if __name__ == "__main__":
    sys.exit(main())


# MIT License
#
# Copyright (c) 2026 the cometlimit authors
#
# Permission is hereby granted, free of charge, to any person obtaining a copy of this
# software and associated documentation files (the "Software"), to deal in the Software
# without restriction, including without limitation the rights to use, copy, modify,
# merge, publish, distribute, sublicense, and/or sell copies of the Software, and to
# permit persons to whom the Software is furnished to do so, subject to the following
# conditions:
#
# The above copyright notice and this permission notice shall be included in all copies
# or substantial portions of the Software.
#
# THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED,
# INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A
# PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT
# HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF
# CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE
# OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
