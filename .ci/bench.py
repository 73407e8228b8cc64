#!/usr/bin/env python3
"""What cometlimit's claims about speed rest on, measured side by side in one run, on loopback.

    python3 .ci/bench.py [limit] [start] [cpu] [load] [--python PATH]

limit   300 prompts, 50 at once, against 10 requests a second: answered, refused, seconds;
        then the same with 3 % of the requests refused by chance on top
start   from the start of the process to the first answer, bytecode kept
cpu     client CPU per answered request over https with keep-alive, all of it counted
load    200 workers for a minute against resets, cut-off bodies, stalls and refusals, and as
        long as what is in hand then takes: up to three more

The OpenAI SDK is measured as well where PATH (default: this interpreter) can import it.
"""
import argparse
import asyncio
import json
import os
import random
import resource
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
KEY = "sk-bench-0001"


class Server:
    """A chat completions server: `rate` requests a second (burst the same), a share of faults."""

    def __init__(self, rate=0.0, latency=0.0, faults=None, certificate=None):
        self.rate, self.latency, self.faults = rate, latency, faults or {}
        self.level, self.at, self.seen, self.cuts, self.answered = rate, None, 0, 0, {}
        self.context = None
        if certificate:
            self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self.context.load_cert_chain(certificate)
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.ready = threading.Event()

    def __enter__(self):
        self.thread.start()
        self.ready.wait(10)
        return self

    def __exit__(self, *_):
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(5)

    def serve(self):
        asyncio.set_event_loop(self.loop)
        listener = self.loop.run_until_complete(asyncio.start_server(
            self.talk, "127.0.0.1", 0, ssl=self.context, backlog=1024))
        self.url = "http%s://127.0.0.1:%d/v1" % (
            "s" if self.context else "", listener.sockets[0].getsockname()[1])
        self.ready.set()
        self.loop.run_forever()

    async def talk(self, reader, writer):
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                size = int(head.lower().partition(b"content-length:")[2].split()[0])
                body = json.loads((await reader.readexactly(size)).decode())
                if not await self.answer(body["messages"][-1]["content"], writer):
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        writer.close()

    async def answer(self, prompt, writer):
        self.seen += 1
        lot, fault = random.random(), None
        for name, share in self.faults.items():
            if 0 <= lot < share:
                fault = name
            lot -= share
        if fault == "reset":
            writer.transport.abort()
            return False
        if fault == "stall":
            await asyncio.sleep(5)  # longer than the client's patience
            return False
        now = time.monotonic()
        if self.rate:
            self.level = min(self.rate, self.level + (now - (self.at or now)) * self.rate)
            self.at = now
        refused = fault == "refuse" or self.rate and self.level < 1
        if refused:
            status, value = 429, {"error": {"message": "slow down", "code": "rate_limit_exceeded"}}
        else:
            self.level -= 1
            await asyncio.sleep(self.latency)
            self.answered[prompt] = self.answered.get(prompt, 0) + 1
            status, value = 200, {
                "id": "x", "object": "chat.completion", "created": 0, "model": "m",
                "choices": [{"index": 0, "finish_reason": "stop", "logprobs": None,
                             "message": {"role": "assistant", "content": "echo: " + prompt}}],
                "usage": {"prompt_tokens": 8, "completion_tokens": 4, "total_tokens": 12}}
        data = json.dumps(value).encode()
        cut = len(data) // 2 if fault == "cut" else len(data)
        self.cuts += cut < len(data)
        writer.write(b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\n"
                     b"Content-Length: %d\r\n\r\n%s" % (status, len(data), data[:cut]))
        await writer.drain()
        return cut == len(data)


# The clients, each run in a process of its own


def with_cometlimit(url, count, width):
    import cometlimit
    with cometlimit.Client(api_key=KEY, base_url=url, model="m", max_concurrency=width) as client:
        return list(client.map(map(str, range(count)), return_exceptions=True))


def with_the_documented_loop(url, count, width):
    """The provider's own: a bounded pool, 5 attempts, min(30, 2 ** attempt) + random() on 429."""
    def ask(prompt):
        body = json.dumps({"model": "m", "messages": [
            {"role": "user", "content": prompt}]}).encode()
        for attempt in range(5):
            try:
                request = urllib.request.Request(url + "/chat/completions", body, {
                    "Authorization": "Bearer " + KEY, "Content-Type": "application/json"})
                with urllib.request.urlopen(request) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as error:
                error.read()
                if error.code != 429 or attempt == 4:
                    return error
                time.sleep(min(30.0, 2.0 ** attempt) + random.random())
    with ThreadPoolExecutor(width) as pool:
        return list(pool.map(ask, map(str, range(count))))


def with_the_sdk(url, count, width):
    import openai
    client = openai.OpenAI(api_key=KEY, base_url=url)

    def ask(prompt):
        try:
            return client.chat.completions.create(
                model="m", messages=[{"role": "user", "content": prompt}])
        except openai.APIError as error:
            return error
    with ThreadPoolExecutor(width) as pool:
        return list(pool.map(ask, map(str, range(count))))


CLIENTS = {"cometlimit": with_cometlimit, "documented loop": with_the_documented_loop,
           "OpenAI SDK": with_the_sdk}


def child(name, url, count, width):
    began = time.monotonic()
    results = CLIENTS[name](url, int(count), int(width))
    use = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps({"answered": sum(not isinstance(r, Exception) for r in results),
                      "wall": time.monotonic() - began, "cpu": use.ru_utime + use.ru_stime}))


def run(python, name, url, count, width, **environment):
    began = time.monotonic()
    command = [python, os.path.abspath(__file__), "--child", name, url, str(count), str(width)]
    out = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=600,
                         env=dict(os.environ, **environment)).stdout
    return dict(json.loads(out.decode()), process=time.monotonic() - began)


# The benchmarks


def limit(python, clients):
    ideal = (300 - 10) / 10 + 0.5
    print("limit: 300 prompts, 50 at once, 10 requests a second in bursts of 10, 0.5 s an answer")
    for chance in (0.0, 0.03):
        print("  %-16s %9s %9s %9s %7s" % (
            "%g %% by chance" % (100 * chance) if chance else "", "answered", "refused",
            "seconds", "ideal"))
        for name in clients:
            with Server(rate=10.0, latency=0.5, faults={"refuse": chance}) as server:
                got = run(python, name, server.url, 300, 50)
                print("  %-16s %9d %8.0f%% %9.1f %7.1f" % (
                    name, got["answered"], 100 * (1 - sum(server.answered.values()) / server.seen),
                    got["wall"], ideal), flush=True)


SCRIPTS = {
    "cometlimit": """import cometlimit
print(cometlimit.ask_all(["hello"], model="m", api_key=%r, base_url=%r))""",
    "documented loop": """import json, urllib.request
print(json.load(urllib.request.urlopen(urllib.request.Request("%.0s%s/chat/completions", json.dumps(
    {"model": "m", "messages": [{"role": "user", "content": "hello"}]}).encode()))))""",
    "OpenAI SDK": """import openai
print(openai.OpenAI(api_key=%r, base_url=%r).chat.completions.create(
    model="m", messages=[{"role": "user", "content": "hello"}]))""",
}


def start(python, clients):
    print("start: a process from its start to its end with one answer, median of 9 in turn")
    times = {name: [] for name in clients}
    with Server() as server, tempfile.TemporaryDirectory() as cache:
        # Bytecode is kept, as it is for the SDK: but for the first run, which does not count.
        environment = dict(os.environ, PYTHONPYCACHEPREFIX=cache, PYTHONDONTWRITEBYTECODE="")
        for _ in range(10):
            for name in clients:
                began = time.monotonic()
                subprocess.run([python, "-c", SCRIPTS[name] % (KEY, server.url)], check=True,
                               cwd=os.path.dirname(HERE), stdout=subprocess.DEVNULL,
                               env=environment)
                times[name].append(time.monotonic() - began)
    ratios(times, "ms", 1000.0)


def cpu(python, clients):
    print("cpu: of the client per answer over https, 16 threads, less its start; median of 5")
    times = {name: [] for name in clients}
    with tempfile.TemporaryDirectory() as folder:
        pem = os.path.join(folder, "pem")
        subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
                        "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1",
                        "-keyout", pem + ".key", "-out", pem + ".crt"], check=True,
                       stderr=subprocess.DEVNULL)
        with open(pem, "w") as both:
            both.write(open(pem + ".key").read() + open(pem + ".crt").read())
        with Server(certificate=pem) as server:
            for _ in range(6):
                for name in clients:
                    few, many = (run(python, name, server.url, count, 16,
                                     SSL_CERT_FILE=pem + ".crt")["cpu"] for count in (16, 1516))
                    times[name].append((many - few) / 1500)
    ratios(times, "ms", 1000.0)


def ratios(times, unit, scale):
    for name in times:
        mine = statistics.median(times[name][1:])  # the first one is a warm-up
        shares = [a / b for a, b in zip(times["cometlimit"][1:], times[name][1:])]
        print("  %-16s %8.2f %s   cometlimit / this: %.2f" % (
            name, mine * scale, unit, statistics.median(shares)), flush=True)


def load(python, clients):
    import cometlimit
    faults = {"reset": 0.01, "cut": 0.01, "stall": 0.01, "refuse": 0.05}
    print("load: 200 workers for 60 s; %s" % ", ".join(
        "%s %g%%" % (name, 100 * share) for name, share in faults.items()))

    def resources():
        status = open("/proc/self/status").read()
        return [len(os.listdir("/proc/self/fd")), threading.active_count(),
                int(status.partition("VmRSS:")[2].split()[0]) // 1024]

    with Server(latency=0.02, faults=faults) as server:
        before, began, codes, count = resources(), time.monotonic(), {}, 0
        client = cometlimit.Client(api_key=KEY, base_url=server.url, model="m", max_concurrency=200,
                                   timeout=3.0, max_delay=2.0)

        def prompts():
            number = 0
            while time.monotonic() < began + 60:
                number += 1
                yield str(number)
        with client:
            for number, done in enumerate(client.map(prompts(), return_exceptions=True), 1):
                count = number
                if isinstance(done, cometlimit.Error):
                    codes[done.code] = codes.get(done.code, 0) + 1
                elif done.text != "echo: %d" % number:
                    codes["WRONG ANSWER"] = codes.get("WRONG ANSWER", 0) + 1
                if number == 500:
                    middle = resources()
        seconds = time.monotonic() - began
        time.sleep(6)  # for the last stall
        twice = sum(times - 1 for times in server.answered.values())
        print("  %.0f s, prompts %d, failed %s, requests %d, served again %d (cut off: %d)" % (
            seconds, count, codes or 0, server.seen, twice, server.cuts))
        print("  descriptors, threads, MB: before %s, after 500 prompts %s, after %s" % (
            before, middle, resources()))


def main():
    if sys.argv[1:2] == ["--child"]:
        return child(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("benchmarks", nargs="*", default=["limit", "start", "cpu"])
    parser.add_argument("--python", default=sys.executable, help="the interpreter of the clients")
    options = parser.parse_args()
    clients = list(CLIENTS)
    probe = subprocess.run([options.python, "-c", "import openai"], stderr=subprocess.DEVNULL)
    if probe.returncode:
        print("the OpenAI SDK is not installed: measured without it")
        clients.remove("OpenAI SDK")
    for name in options.benchmarks:
        globals()[name](options.python, clients)


if __name__ == "__main__":
    main()
