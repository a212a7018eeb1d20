"""A server on this machine that speaks the OpenAI protocol, for tests of what asks one."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from transfuse.core.tokens import pieces


class Server:
    """Speaks enough of the protocol: `plan` holds (status, headers, delay) for the first requests.

    Chats are answered by `text`, or by an echo. Once `serve` has given it a model, it tells the likeliest next
    tokens, in completions and in chats; `names` says how: "text", "number", or "record" (as llama.cpp does).
    """

    def __init__(self):
        self.plan, self.requests, self.times, self.text, self.in_flight, self.most = [], [], [], None, 0, 0
        self.usage, self.body = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}, None
        lock, owner = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    owner.requests.append((self.path, self.headers.get("Authorization"), request))
                    owner.times.append(time.monotonic())
                    status, headers, delay = owner.plan.pop(0) if owner.plan else (200, {}, 0.0)
                    owner.in_flight += 1
                    owner.most = max(owner.most, owner.in_flight)
                time.sleep(delay)
                with lock:
                    owner.in_flight -= 1
                if owner.body is not None:
                    answer = owner.body
                elif status == 200:
                    good = owner.ranked(request) if request.get("logprobs") else owner.chat(request)
                    answer = json.dumps(good).encode()
                else:
                    answer = json.dumps({"error": {"message": headers.pop("message", "no")}}).encode()
                try:
                    self.send_response(status)
                    for name, value in {"Content-Type": "application/json", **headers}.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(answer)))
                    self.end_headers()
                    self.wfile.write(answer)
                except (BrokenPipeError, ConnectionResetError):
                    pass  # the client gave up waiting, as one test wants

            def log_message(self, *args):
                pass

        self.model = self.tokenizer = self.known = None
        self.names, self.lock = "text", threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def chat(self, request):
        content = self.text or f"You said: {request['messages'][-1]['content']}"
        message = {"role": "assistant", "content": content}
        return {
            "id": "1", "object": "chat.completion", "created": 0, "model": request["model"],
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}], "usage": self.usage,
        }  # fmt: skip

    def serve(self, model, tokenizer, names="text"):
        """Tell the next tokens of `model` from now on."""
        self.model, self.tokenizer, self.names = model, tokenizer, names
        self.known = pieces(tokenizer)[0]

    def ranked(self, request):
        import torch

        chat = "messages" in request
        if chat:  # no template: what was said, one after the other
            ids = self.tokenizer("".join(m["content"] for m in request["messages"]))["input_ids"]
        else:
            ids = request["prompt"]
            ids = self.tokenizer(ids)["input_ids"] if isinstance(ids, str) else ids
        with torch.no_grad(), self.lock:
            logprobs = self.model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
        best = logprobs.topk(request["top_logprobs" if chat else "logprobs"])
        entries = [
            {"token": self.named(token), "logprob": value, "bytes": list(self.known[token])}
            for token, value in zip(best.indices.tolist(), best.values.tolist())
        ]
        if self.names == "record":
            for entry, token in zip(entries, best.indices.tolist()):
                entry |= {"id": token, "token": "", "bytes": []}
        if chat or self.names == "record":
            told = {"content": [{**entries[0], "top_logprobs": entries}]}
        else:
            told = {
                "tokens": [entries[0]["token"]], "token_logprobs": [entries[0]["logprob"]], "text_offset": [0],
                "top_logprobs": [{entry["token"]: entry["logprob"] for entry in entries}],
            }  # fmt: skip
        choice = {"index": 0, "finish_reason": "length", "logprobs": told}
        choice |= {"message": {"role": "assistant", "content": "x"}} if chat else {"text": "x"}
        return {
            "id": "1", "object": "x", "created": 0, "model": request["model"], "choices": [choice],
            "usage": {"prompt_tokens": len(ids), "completion_tokens": 1, "total_tokens": len(ids) + 1},
        }  # fmt: skip

    def named(self, token):
        """A token as OpenAI's completions name it, or by number."""
        if self.names == "number":
            return f"token_id:{token}"
        data = self.known[token]
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(chr(b) if 32 <= b < 127 else f"\\x{b:02x}" for b in data)

    def close(self):
        self.server.shutdown()
        self.server.server_close()
