"""Stand-in of `data`: a handful of samples as MetaMathQA has them."""

SAMPLES = [
    {
        "type": "GSM_Rephrased",
        "query": f"Anna has {a} apples and buys {b} more. How many apples does she have?",
        "original_question": f"How many apples are {a} and {b}?",
        "response": f"{a} + {b} = {a + b}.\nThe answer is: {a + b}",
    }
    for a, b in ((2, 3), (4, 1), (6, 2), (3, 3), (5, 4), (7, 1))
]


def get_train_samples(tokenizer, query_template: str) -> list[list[int]]:
    texts = [query_template.format(query=s["query"]) + " " + s["response"] for s in SAMPLES]
    return [ids + [tokenizer.eos_token_id] for ids in tokenizer(texts)["input_ids"]]
