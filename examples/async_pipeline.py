"""Put requests from several threads into one running model; each thread gets its own answers.

python examples/async_pipeline.py [MODEL]
"""

import sys
import threading

from mii.api import async_pipeline
from mii.config import ModelConfig
from mii.modeling.checkpoint import find_default_model

model = sys.argv[1] if len(sys.argv) > 1 else str(find_default_model())
pipe = async_pipeline(ModelConfig(model_name_or_path=model))
pipe.start()


def ask(name: str, prompts: list[str]) -> None:
    waiting = {pipe.put_request(prompt, {"max_new_tokens": 16}): prompt for prompt in prompts}
    while waiting:
        uid, response = pipe.get_response()  # in the order in which they end
        print(f"{name}: {waiting.pop(uid)} ->{response}\n", end="")  # one write: another thread prints too


threads = [
    threading.Thread(target=ask, args=("first", ["The sun is", "The moon is"])),
    threading.Thread(target=ask, args=("second", ["Water is", "Fire is", "Air is"])),
]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
pipe.shutdown()
