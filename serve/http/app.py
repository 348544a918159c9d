"""The HTTP endpoints: OpenAI's, SGLang's own, and what operators ask. Every error is OpenAI's error object."""

import time
import warnings
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import Response
from pydantic.json_schema import models_json_schema

from wave64.serve.http import guard, page, tokens
from wave64.serve.http.generation import Generator
from wave64.serve.http.guard import EventStream, json_response, read, unless_gone
from wave64.serve.http.metrics import CONTENT_TYPE
from wave64.serve.http.native import Generate
from wave64.serve.http.openai import Chat, Completion, Job
from wave64.serve.http.operator_schemas import AbortRequest, DetokenizeRequest, ProfileRequest, TokenizeRequest
from wave64.serve.http.responses import Response as Responses
from wave64.serve.http.responses import ResponsesRequest
from wave64.serve.http.schemas import ApiError, Body, ChatRequest, CompletionRequest, GenerateRequest
from wave64.serve.messages import StartProfile, StopProfile

READ = ["GET", "HEAD"]
BODIES = (CompletionRequest, ChatRequest, ResponsesRequest, GenerateRequest, TokenizeRequest, DetokenizeRequest,
          AbortRequest, ProfileRequest)  # fmt: skip


def create_app(generator: Generator) -> FastAPI:
    """The application over one engine."""
    app = FastAPI(title="wave64", version=version("wave64"), redoc_url=None)
    args, client = generator.args, generator.client
    guard.install(app, args, generator.metrics)
    started = int(time.time())
    card = {"id": args.model_name, "object": "model", "created": started, "owned_by": "wave64",
            "root": generator.model_path}  # fmt: skip

    @app.api_route("/", methods=READ, include_in_schema=False)
    async def front() -> Response:
        return Response(page.HTML, media_type="text/html", headers=page.HEADERS)

    @app.post("/v1/completions", openapi_extra=takes(CompletionRequest))
    async def completions(request: Request) -> Response:
        return await served(request, Completion(await read(request, CompletionRequest), generator))

    @app.post("/v1/chat/completions", openapi_extra=takes(ChatRequest))
    async def chat_completions(request: Request) -> Response:
        return await served(request, Chat(await read(request, ChatRequest), generator))

    @app.post("/v1/responses", openapi_extra=takes(ResponsesRequest))
    async def responses(request: Request) -> Response:
        return await served(request, Responses(await read(request, ResponsesRequest), generator))

    async def served(request: Request, job: Job | Responses | Generate) -> Response:
        generator.check_model(job.body.model)
        await unless_gone(request, job.prepare())
        request.state.choices = job.choices
        if job.body.stream:
            return EventStream(job.stream())
        return json_response(await unless_gone(request, job.answer()))

    @app.api_route("/v1/models", methods=READ)
    async def models() -> Response:
        return json_response({"object": "list", "data": [card | {"max_model_len": generator.ready.context_length}]})

    @app.api_route("/v1/models/{name:path}", methods=READ)
    async def model(name: str) -> Response:
        if name != args.model_name:
            generator.check_model(name)
            raise ApiError(f"{name}: no such model, expected {args.model_name}", "model", "model_not_found", 404)
        return json_response(card | {"max_model_len": generator.ready.context_length})

    @app.post("/generate", openapi_extra=takes(GenerateRequest))
    @app.put("/generate", openapi_extra=takes(GenerateRequest), include_in_schema=False)
    async def generate(request: Request) -> Response:
        return await served(request, Generate(await read(request, GenerateRequest), generator))

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
        settings = asdict(args)
        settings |= {name: settings[name] and "***" for name in ("api_key", "ssl_keyfile_password")}
        engine = {"engine": generator.ready, "statistics": client.statistics}
        return json_response(settings | msgspec.to_builtins(engine))

    @app.post("/tokenize", openapi_extra=takes(TokenizeRequest))
    @app.post("/v1/tokenize", openapi_extra=takes(TokenizeRequest), include_in_schema=False)
    async def tokenize(request: Request) -> Response:
        body = await read(request, TokenizeRequest)
        return json_response(await unless_gone(request, tokens.tokenize(body, generator)))

    @app.post("/detokenize", openapi_extra=takes(DetokenizeRequest))
    @app.post("/v1/detokenize", openapi_extra=takes(DetokenizeRequest), include_in_schema=False)
    async def detokenize(request: Request) -> Response:
        return json_response(tokens.detokenize(await read(request, DetokenizeRequest), generator))

    @app.post("/abort_request", openapi_extra=takes(AbortRequest))
    async def abort_request(request: Request) -> Response:
        """End a request of /generate by its `rid` (`meta_info.id`), or all; what they have is answered."""
        body = await read(request, AbortRequest)
        if body.abort_all or body.rid:
            client.abort_all(None if body.abort_all else body.rid)
        return json_response({})

    @app.get("/flush_cache", include_in_schema=False)
    @app.post("/flush_cache")
    async def flush_cache() -> Response:
        """Empty the prefix cache; refused while requests run."""
        if not await client.flush_cache():
            raise ApiError("the cache was not flushed: requests run or wait")
        return json_response({"success": True})

    @app.get("/start_profile", include_in_schema=False)
    @app.post("/start_profile", openapi_extra=takes(ProfileRequest))
    async def start_profile(request: Request) -> Response:
        """Record what the engine does, by torch's profiler or RPD, until /stop_profile or for `num_steps` steps."""
        body = await read(request, ProfileRequest, b"{}")
        if args.profile_dir is None:
            raise ApiError("no folder for traces: start the server with --profile-dir FOLDER")
        top = Path(args.profile_dir).resolve()
        folder = (top / (body.output_dir or "")).resolve()
        if not folder.is_relative_to(top):
            raise ApiError(f"output_dir: expected a folder in {top} (--profile-dir), got {folder}", "output_dir")
        await client.profile(StartProfile(str(folder), body.num_steps, (*(body.activities or ("CPU", "GPU")),),
                                          bool(body.with_stack), bool(body.record_shapes)))  # fmt: skip
        return json_response({"success": True, "output_dir": str(folder)})

    @app.get("/stop_profile", include_in_schema=False)
    @app.post("/stop_profile")
    async def stop_profile() -> Response:
        """Write the trace; where `num_steps` were asked for it is written already."""
        return json_response({"success": True, "files": await client.profile(StopProfile())})

    @app.api_route("/version", methods=READ)
    async def own_version() -> Response:
        return json_response({"version": app.version})

    @app.api_route("/metrics", methods=READ)
    async def metrics() -> Response:
        return Response(generator.metrics.text(), media_type=CONTENT_TYPE)

    @app.api_route("/health", methods=READ)
    @app.api_route("/ping", methods=READ)
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

    app.openapi = lambda: described(app)
    return app


def takes(body: type[Body]) -> dict[str, Any]:
    """For OpenAPI: what an endpoint reads."""
    schema = {"$ref": f"#/components/schemas/{body.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def described(app: FastAPI) -> dict[str, Any]:
    """/openapi.json"""
    if app.openapi_schema is None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # GET and HEAD of a path have one operation's name; HEAD is left out
            app.openapi_schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        for methods in app.openapi_schema["paths"].values():
            methods.pop("head", None)
            for method in methods.values():
                method["responses"].pop("422", None)  # FastAPI's own, which is not answered
        _, schemas = models_json_schema([(body, "validation") for body in BODIES],
                                        ref_template="#/components/schemas/{model}")  # fmt: skip
        app.openapi_schema.setdefault("components", {})["schemas"] = schemas["$defs"]
    return app.openapi_schema
