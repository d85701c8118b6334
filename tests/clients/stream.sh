#!/bin/sh
# The events of a streamed answer as they come (-N), with curl and nothing else:
#
#     sh stream.sh http://127.0.0.1:8000 "Explain nginx in one sentence"
set -eu
curl --fail-with-body --no-progress-meter -N "$1/api/chat" \
    -H 'Content-Type: application/json' \
    -d '{"stream": true, "messages": [{"role": "user", "content": "'"$2"'"}]}'
