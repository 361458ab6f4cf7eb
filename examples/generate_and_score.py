"""Generate with log-probabilities, then score the very same tokens: `python examples/generate_and_score.py`."""

from headrace import Engine, SamplingParams
from headrace.rl.demo import POLICY

with Engine(model=str(POLICY), num_threads=1) as engine:
    tokenizer = engine.tokenizer
    prompt_ids = tokenizer.apply_chat_template([{"role": "user", "content": "17+25=?"}])

    samples = engine.generate(
        input_ids=prompt_ids, sampling_params=SamplingParams(n=4, max_new_tokens=24, temperature=1.0, seed=1)
    )
    for sample in samples:
        print(f"{sample.text}  {sample.finish_reason}  logprob {sum(sample.logprobs):.3f}  {sample.version_spans}")

    # Scoring generates nothing: it answers the log-probability of each prompt token, here of prompt and reply.
    scored = engine.score(input_ids=[prompt_ids + sample.token_ids for sample in samples])
    for sample, score in zip(samples, scored, strict=True):
        again = score.prompt_logprobs[len(prompt_ids) :]
        difference = max(abs(a - b) for a, b in zip(sample.logprobs, again, strict=True))
        print(f"{sample.text}  scored again: max difference {difference:.1e}")
