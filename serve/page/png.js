// Texts that a PNG carries, in iTXt chunks.

export function textOf(bytes, key) {
  const view = new DataView(bytes.buffer);
  const latin = (from, to) => String.fromCharCode(...bytes.subarray(from, to));
  if (latin(1, 4) !== "PNG") throw new Error("no PNG");
  for (let at = 8; at + 12 <= bytes.length; ) {
    const length = view.getUint32(at);
    const start = at + 8;
    if (latin(at + 4, start) === "iTXt" && latin(start, start + key.length + 1) === `${key}\0`) {
      return new TextDecoder().decode(bytes.subarray(start + key.length + 5, start + length));
    }
    at = start + length + 4;
  }
  throw new Error("no such text");
}
