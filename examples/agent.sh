#!/bin/sh
# An agent in four calls: register, heartbeat, logs, result. Each job runs ./deploy.sh, with the ref in $DEPLOY_REF.
#   DEPLOYBOT_URL=http://localhost:8080 DEPLOYBOT_AGENT_TOKEN=... sh agent.sh [HOSTNAME [COMMAND]]
# The token is one of this host (ctl.py token create --role agent --host HOSTNAME), or the one to enrol with: what that brings is kept.
unset TOKEN GIVEN SECRET ANSWER # what comes in exported would go out so to the scripts, which get no token
URL=${DEPLOYBOT_URL:-http://localhost:8080} GIVEN=${DEPLOYBOT_AGENT_TOKEN:-} HOST=${1:-$(uname -n)} COMMAND=${2:-./deploy.sh}
unset DEPLOYBOT_AGENT_TOKEN # it goes to curl on a descriptor, as others can read command lines
post() { curl -sSf -m 60 --retry 5 --retry-connrefused -H 'Content-Type: application/json' -H @/dev/fd/3 --data-binary @- "$URL$1" 3<<HEADER
X-Agent: shell${TOKEN:+
Authorization: Bearer $TOKEN}
HEADER
}
field() { printf '%s' "$2" | grep -oE "\"$1\": *(\"[^\"\\\\]*\"|[0-9]+)" | head -n 1 | sed 's/^[^:]*: *//; s/"//g'; }
beat() { printf '{"status":"online","wait":%s}' "$1" | post "/v1/agents/$AGENT/heartbeat"; }
register() { TOKEN=$1; ANSWER=$(printf '{"hostname":"%s"}' "$HOST" | post /v1/agents/register) && AGENT=$(field id "$ANSWER") && [ "$AGENT" ]; }
KEPT=${HOME:-.}/.deploybot-$HOST
{ [ -s "$KEPT" ] && register "$(cat "$KEPT")"; } || register "$GIVEN" || exit 1
SECRET=$(field token "$ANSWER") && [ "$SECRET" ] && { rm -f "$KEPT"; (umask 077; echo "$SECRET" >"$KEPT"); TOKEN=$SECRET; }
EXIT=$(mktemp) && trap 'rm -f "$EXIT"' EXIT
while :; do
  ANSWER=$(beat 25) && JOB=$(field id "$ANSWER") && [ "$JOB" ] || { sleep 1; continue; }
  ATTEMPT=$(field attempt "$ANSWER") N=0
  while sleep 20; do beat 0; done >/dev/null 2>&1 & BEATS=$!
  { DEPLOY_REF=$(field ref "$ANSWER") DEPLOY_JOB_ID=$JOB sh -c "$COMMAND" 2>&1 </dev/null; echo $? >"$EXIT"; } | while IFS= read -r LINE || [ "$LINE" ]; do
    LINE=$(printf '%s' "$LINE" | LC_ALL=C sed 's/[\\"]/\\&/g; s/[[:cntrl:]]/ /g')
    printf '{"attempt":%s,"offset":%s,"lines":[{"message":"%s"}]}' "$ATTEMPT" "$N" "$LINE" | post "/v1/jobs/$JOB/logs" >/dev/null && N=$((N + 1))
  done
  kill "$BEATS"; CODE=$(cat "$EXIT"); STATUS=failed REASON='"exit_code"'; [ "$CODE" -eq 0 ] && STATUS=success REASON=null
  printf '{"attempt":%s,"status":"%s","exit_code":%s,"reason":%s}' "$ATTEMPT" "$STATUS" "$CODE" "$REASON" | post "/v1/jobs/$JOB/result" >/dev/null
done
