# The console command and the example application, on Postgres.
FROM python:3.13-slim AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY migrations migrations
COPY persistence persistence
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.13-slim
ENV PYTHONUNBUFFERED=1
COPY --from=wheel /wheels /wheels
RUN pip install --no-cache-dir "$(echo /wheels/*.whl)[postgres,encryption]" fastapi uvicorn \
    && rm -rf /wheels \
    && useradd --system --uid 10001 --no-create-home app
WORKDIR /app
COPY examples examples
USER app
CMD ["persistence", "status"]
