"""The parts of `mii bench serve` (mii/benchmark/serve.py).

server.py       what requests are sent to, and what it takes
work.py         what is asked: how long prompts and answers are, and the prompts themselves
trace.py        one request as it went
target.py       how requests are sent, whatever is spoken
grpc_target.py  requests over gRPC
http_target.py  requests over HTTP: /mii/<name> and OpenAI's completions
http_stream.py  the HTTP/1.1 connection under it
load.py         when requests are sent: closed loop or Poisson arrivals
figures.py      from traces to figures
processes.py    processor time of a deployment's processes
report.py       the table and the JSON file
plot.py         the picture
"""
