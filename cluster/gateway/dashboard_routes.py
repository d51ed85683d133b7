"""The routes of the dashboard: `/`, a page that holds no data, and `/dashboard.json`, all of it.

The page is one file. Its headers forbid it everything but its own two inline blocks, which they
name by hash, and requests to this gateway.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CollectorRegistry

from cluster.gateway.dashboard import Dashboard, Reading, Traffic
from cluster.gateway.service import GatewayService
from cluster.telemetry import software_version
from cluster.trainstate import TrainingState, training_states

_PAGE = Path(__file__).with_name("dashboard.html")


def dashboard_router(
    service: GatewayService,
    *,
    trainings: Callable[[], Sequence[TrainingState]] = training_states,
    monotonic_s: Callable[[], float] = time.monotonic,
) -> APIRouter:
    """Return both routes."""
    page = _PAGE.read_text(encoding="utf-8")
    headers = page_headers(page)
    dashboard = Dashboard()

    async def show_page() -> Response:
        return HTMLResponse(page, headers=headers)

    async def show_state() -> Response:
        status = await service.status()
        now_s = monotonic_s()  # of the counters, before anything else takes its time
        runs = await asyncio.to_thread(trainings)
        reading = Reading(
            monotonic_s=now_s,
            unix_s=datetime.now(UTC).timestamp(),
            version=software_version(),
            model=service.model_info(),
            plan=service.plan(),
            status=status,
            controller=service.controller(),
            trainings=runs,
            traffic=traffic_of(service.metrics.registry),
        )
        return JSONResponse(dashboard.show(reading), headers={"Cache-Control": "no-store"})

    router = APIRouter()
    router.add_api_route("/", show_page, methods=["GET"], response_model=None)
    router.add_api_route("/dashboard.json", show_state, methods=["GET"], response_model=None)
    return router


def page_headers(page: str) -> dict[str, str]:
    """Return the headers of a page, by which its own inline blocks are all that runs."""
    policy = [
        "default-src 'none'",
        f"script-src {_hashes('script', page)}",
        f"style-src {_hashes('style', page)}",
        "img-src data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
    return {
        "Content-Security-Policy": "; ".join(policy),
        "Cache-Control": "no-cache",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
    }


def _hashes(tag: str, page: str) -> str:
    blocks = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    digests = (base64.b64encode(hashlib.sha256(block.encode()).digest()) for block in blocks)
    return " ".join(f"'sha256-{digest.decode()}'" for digest in digests)


def traffic_of(registry: CollectorRegistry) -> Traffic:
    """Return what the gateway's metrics have counted."""
    samples = [sample for family in registry.collect() for sample in family.samples]
    totals = {sample.name: sample.value for sample in samples if not sample.labels}
    return Traffic(
        requests={
            sample.labels["outcome"]: sample.value
            for sample in samples
            if sample.name == "motley_requests_total"
        },
        prompt_tokens=totals["motley_prompt_tokens_total"],
        generated_tokens=totals["motley_generated_tokens_total"],
    )
