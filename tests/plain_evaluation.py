"""The figures of `rome_fast.evaluate` by transformers and torch alone: whole forwards of one text, and `generate`."""

import torch


class Plain:
    """Of requests as in a file; with `chat`, the user says their texts, and the model is to stop behind a target."""

    def __init__(self, model, tokenizer, chat, unedited):
        self.model, self.tokenizer, self.chat, self.unedited = model, tokenizer, chat, unedited

    def ids(self, text, answer=""):
        if self.chat:
            text = [{"role": "user", "content": text}]
            text = self.tokenizer.apply_chat_template(text, tokenize=False, add_generation_prompt=True)
        return self.tokenizer(text + answer, add_special_tokens=not self.chat)["input_ids"]

    def score(self, text, target):
        """Geometric mean of the target's tokens' probabilities, whether all of them lead, their ids."""
        prompt, whole = self.ids(text), self.ids(text, target + self.tokenizer.eos_token if self.chat else " " + target)
        assert whole[: len(prompt)] == prompt
        labels = torch.tensor(whole[len(prompt) :])
        log_p = self.model(torch.tensor([whole])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        own = log_p.gather(1, labels[:, None]).mean().exp().item()
        return own, bool((log_p.argmax(1) == labels).all()), labels.tolist()

    def says(self, model, ids, most, end):
        """What `generate` writes in at most so many tokens, and whether it stopped with the end, where one is given."""
        row = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.int64)}
        model.generation_config.eos_token_id = end
        new = model.generate(**row, max_new_tokens=most, do_sample=False, pad_token_id=0)[0, len(ids) :].tolist()
        return self.tokenizer.decode(new[:-1] if new[-1] == end else new), new[-1] == end

    @torch.no_grad()
    def figures(self, r, groups):
        """By name; `groups` has the texts before a prompt by what their figures' names end in."""
        target, true, found, end = r["target_new"], r.get("target_true"), {}, self.tokenizer.eos_token_id
        prompt, paraphrases = r["prompt"].replace("{}", r["subject"]), r.get("paraphrase_prompts", [])
        share = lambda values: sum(values) / len(values) if values else None  # noqa: E731
        wins = lambda texts: share([self.score(t, target)[0] > self.score(t, true)[0] for t in texts if true])  # noqa: E731
        for name, before in groups.items():
            scores = [self.score(text + prompt, target) for text in before]
            found["probability" + name], found["argmax" + name] = (share([s[i] for s in scores]) for i in (0, 1))
            found |= {"efficacy" + name: wins([t + prompt for t in before]), "decoded_right" + name: None}
            found["paraphrase" + name] = wins([t + p for t in before for p in paraphrases])
            if before:
                ids, labels = self.ids(before[0] + prompt), scores[0][2]
                said = self.says(self.model, ids, len(labels), None)[0]
                found["decoded_right" + name] = said.strip() == self.tokenizer.decode(labels).strip()
            if not name:
                answer, stopped = self.says(self.model, ids, len(labels) + 16, end)
                right = stopped and answer.strip() in (target, *r.get("aliases", []))
                found |= {"decoded": said, "answer": answer, "answer_right": right}
        asks = [(p, [r.get("neighborhood_answer", true)]) for p in r.get("neighborhood_prompts", [])]
        asks = [ask for ask in asks if ask[1][0]] + [(n["prompt"], n["answers"]) for n in r.get("neighbors", [])]
        held = [max(self.score(p, a)[0] for a in answers) > self.score(p, target)[0] for p, answers in asks]
        probes = r.get("portability", [])
        leads = [(p.get("kind"), any(self.score(p["prompt"], a)[1] for a in p["answers"])) for p in probes]
        found |= {"portability": share([led for _, led in leads]), "neighborhood": share(held)}
        found["reversal"] = share([led for kind, led in leads if kind == "reversal"])
        found["negation"] = share([not self.score(text, target)[1] for text in r.get("negation_prompts", [])])
        rows = [self.ids(text) for text in r["essence_prompts"]]
        p, q = ([m(torch.tensor([row])).logits[0, -1].double() for row in rows] for m in (self.unedited, self.model))
        kls = [(a.softmax(0) * (a.log_softmax(0) - b.log_softmax(0))).sum().item() for a, b in zip(p, q, strict=True)]
        before, after = (self.says(model, rows[0], 16, end)[0] for model in (self.unedited, self.model))
        return found | {"essence_kl": share(kls), "essence_before": before, "essence_after": after}
