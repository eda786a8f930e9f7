FROM python:3.11-slim

RUN pip install --no-cache-dir --disable-pip-version-check PyYAML==6.0.3

WORKDIR /app
COPY deploybot.py agent.py ctl.py openapi.json ./
COPY www ./www
COPY apps.yaml /etc/deploybot/apps.yaml

# A user by number, so that a cluster can see that it is not root. /data holds the database and, at first start, admin.token.
RUN install --directory --owner=10001 --group=10001 --mode=0700 /data
USER 10001:10001
VOLUME /data
ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    DEPLOYBOT_DB=/data/deploybot.db \
    DEPLOYBOT_APPS=/etc/deploybot/apps.yaml
EXPOSE 8080

HEALTHCHECK --interval=15s --timeout=5s --start-period=10s --retries=3 \
    CMD ["python", "-c", "import http.client, os, sys; c = http.client.HTTPConnection('127.0.0.1', int(os.environ.get('DEPLOYBOT_PORT', 8080)), timeout=4); c.request('GET', '/health'); sys.exit(c.getresponse().status != 200)"]

# As PID 1 it handles SIGTERM itself and ends within 5 seconds.
ENTRYPOINT ["python", "deploybot.py"]
