"""Distil from a teacher: `python examples/score_with_a_teacher.py`. What a student says is scored by a teacher.

The mean over a reply of log p(student) - log p(teacher) is the reverse KL divergence, seen at tokens that the student
drew: what on-policy distillation brings down. Scoring generates nothing and is one prefill for each reply.
"""

from headrace import Engine
from headrace.rl.demo import POLICY

CHATS = [[{"role": "user", "content": f"{a}+{b}=?"}] for a, b in ((17, 25), (3, 4), (60, 9))]


def reverse_kl(student: Engine, teacher: Engine) -> float:
    replies = student.chat(CHATS, {"n": 4, "max_new_tokens": 16, "seed": 1})
    rows = [reply.prompt_token_ids + reply.sample.token_ids for reply in replies]
    # Both at temperature 1: "temperature", the default of what is sampled, and "raw", that of what is scored, agree.
    scored = teacher.score(input_ids=rows, top_logprobs=3)
    differences: list[float] = []
    for reply, score in zip(replies, scored, strict=True):
        start = len(reply.prompt_token_ids)
        of_teacher = score.prompt_logprobs[start:]
        differences += [ours - theirs for ours, theirs in zip(reply.sample.logprobs, of_teacher, strict=True)]
    wanted = max(scored[0].prompt_top_logprobs[len(replies[0].prompt_token_ids)].items(), key=lambda each: each[1])
    print(f"the teacher would begin with {teacher.tokenizer.decode([wanted[0]])!r} (log-probability {wanted[1]:.2f})")
    return sum(differences) / len(differences)


with Engine(POLICY, inprocess=True, num_threads=1) as teacher:
    with Engine(POLICY, inprocess=True, num_threads=1, load_format="dummy", seed=0) as untrained:
        print(f"an untrained student: {reverse_kl(untrained, teacher):.3f} nats a token")
    print(f"the teacher itself: {reverse_kl(teacher, teacher):.3f} nats a token")
