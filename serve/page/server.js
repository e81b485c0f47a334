// The server's answers, and the key that it may want.

const $ = (id) => document.getElementById(id);

export async function ask(path, options = {}) {
  const key = sessionStorage.getItem("hart-key");
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  const told = await response.json().then((body) => body.error, () => null);
  const refusal = { message: `The server answered ${response.status}.`, ...told, status: response.status };
  if (response.status === 401) {
    await askForKey(key ? "That is not this server's key." : "");
    return ask(path, options);
  }
  throw Object.assign(new Error(refusal.message), { refusal });
}

function askForKey(words) {
  $("key-error").textContent = words;
  $("key-dialog").showModal();
  return new Promise((done) => {
    $("key-form").onsubmit = () => {
      sessionStorage.setItem("hart-key", $("key").value.trim());
      $("key").value = "";
      done();
    };
  });
}

export async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const blocks = text.split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const data = block.split("\n").find((line) => line.startsWith("data: "));
      if (data) yield JSON.parse(data.slice(6));
    }
  }
}
