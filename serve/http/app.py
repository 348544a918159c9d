"""The HTTP endpoints: OpenAI's, SGLang's own, and what operators ask. Every error is OpenAI's error object."""

import time
from dataclasses import asdict

import msgspec
from fastapi import FastAPI, Request
from fastapi.responses import Response

from wave64.serve.http import guard
from wave64.serve.http.generation import Generator
from wave64.serve.http.guard import EventStream, json_response, read, unless_gone
from wave64.serve.http.metrics import CONTENT_TYPE
from wave64.serve.http.native import Generate
from wave64.serve.http.openai import Chat, Completion, Job, answer, stream
from wave64.serve.http.schemas import ApiError, ChatRequest, CompletionRequest, GenerateRequest

READ = ["GET", "HEAD"]


def create_app(generator: Generator) -> FastAPI:
    """The application over one engine."""
    app = FastAPI(title="wave64", docs_url=None, redoc_url=None, openapi_url=None)
    args, client = generator.args, generator.client
    guard.install(app, args, generator.metrics)
    started = int(time.time())
    card = {"id": args.model_name, "object": "model", "created": started, "owned_by": "wave64",
            "root": generator.model_path}  # fmt: skip

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await openai(request, Completion(await read(request, CompletionRequest), generator))

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await openai(request, Chat(await read(request, ChatRequest), generator))

    async def openai(request: Request, job: Job) -> Response:
        generator.check_model(job.body.model)
        await unless_gone(request, job.prepare())
        request.state.choices = job.choices
        if job.body.stream:
            return EventStream(stream(job))
        return json_response(await unless_gone(request, answer(job)))

    @app.api_route("/v1/models", methods=READ)
    async def models() -> Response:
        return json_response({"object": "list", "data": [card | {"max_model_len": generator.ready.context_length}]})

    @app.api_route("/v1/models/{name:path}", methods=READ)
    async def model(name: str) -> Response:
        if name != args.model_name:
            generator.check_model(name)
            raise ApiError(f"{name}: no such model, expected {args.model_name}", "model", "model_not_found", 404)
        return json_response(card | {"max_model_len": generator.ready.context_length})

    @app.api_route("/generate", methods=["POST", "PUT"])
    async def generate(request: Request) -> Response:
        job = Generate(await read(request, GenerateRequest), generator)
        generator.check_model(job.body.model)
        await unless_gone(request, job.prepare())
        request.state.choices = job.choices
        if job.body.stream:
            return EventStream(job.stream())
        return json_response(await unless_gone(request, job.answer()))

    @app.api_route("/get_model_info", methods=READ)
    @app.api_route("/model_info", methods=READ)
    async def model_info() -> Response:
        return json_response({
            "model_path": generator.model_path,
            "tokenizer_path": generator.tokenizer_path,
            "is_generation": True,
            "preferred_sampling_params": generator.ready.sampling_defaults or None,
            "max_context_length": generator.ready.context_length,
            "vocab_size": generator.ready.vocab_size,
        })

    @app.api_route("/get_server_info", methods=READ)
    @app.api_route("/server_info", methods=READ)
    async def server_info() -> Response:
        settings = asdict(args) | {"api_key": args.api_key and "***"}
        engine = {"engine": generator.ready, "statistics": client.statistics}
        return json_response(settings | msgspec.to_builtins(engine))

    @app.api_route("/metrics", methods=READ)
    async def metrics() -> Response:
        return Response(generator.metrics.text(), media_type=CONTENT_TYPE)

    @app.api_route("/health", methods=READ)
    async def health() -> Response:
        """200 once requests are served, 503 before and after; what serves them, in any case."""
        well = generator.is_serving and client.lost is None
        body = {"status": "ok" if well else "failed" if client.lost else "starting", "model": args.model_name}
        if client.lost is not None:
            body["error"] = client.lost
        if client.ready is not None:
            body |= {"running": client.num_live, **msgspec.to_builtins(client.ready)}
            del body["type"]
        return json_response(body, 200 if well else 503)

    @app.api_route("/health_generate", methods=READ)
    async def health_generate() -> Response:
        await generator.warm_up()
        return json_response({"status": "ok"})

    return app
