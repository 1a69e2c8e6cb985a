"""`/v1/responses`, without memory: what OpenAI's newer API says, in terms of chat completions.

- `request`: the body, checked; what would need a store is refused.
- `to_chat`: the chat completion it stands for.
- `structs`: what goes out: responses, items, events.
- `output`: the pieces of an answer as items.
- `reply`, `events`: the answer in one piece, and as typed events.
"""
