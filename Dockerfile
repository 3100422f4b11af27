# The console command and the example service, on Postgres. Packages are those of requirements.txt (make lock).
FROM python:3.13.16-slim-trixie AS build
COPY --from=ghcr.io/astral-sh/uv:0.13.9 /uv /usr/local/bin/uv
ENV UV_COMPILE_BYTECODE=1
RUN uv venv /opt/venv
WORKDIR /src
COPY requirements.txt ./
RUN uv pip install --python /opt/venv --no-cache --require-hashes -r requirements.txt
COPY pyproject.toml README.md LICENSE ./
COPY migrations migrations
COPY persistence persistence
RUN uv pip install --python /opt/venv --no-cache --no-deps .

FROM python:3.13.16-slim-trixie
RUN useradd --system --uid 10001 --no-create-home app
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
WORKDIR /app
COPY examples examples
USER 10001
EXPOSE 8000
HEALTHCHECK --interval=5s --timeout=3s --start-period=30s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/persistence/readyz', timeout=2)"]
CMD ["uvicorn", "examples.fastapi_chat:app", "--host", "0.0.0.0", "--port", "8000"]
