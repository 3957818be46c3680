"""Pages in a real browser: headless Chromium loads one, a script works on it and says what it found."""

import html
import json
import re
import shutil
import subprocess

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

# The page stands unchanged, with its own policy, in frames as wide as a desk's screen and as a phone's; the script of
# the test is outside. What goes wrong in a frame is written down from before its first byte.
_FRAMES = """<!doctype html><meta charset="utf-8"><body style="margin:0"><script>
const sleep = seconds => new Promise(done => setTimeout(done, 1000 * seconds));
const open = (page, width) => {
  const frame = document.createElement("iframe");
  frame.style = `width: ${width}px; height: 800px; border: 0`;
  document.body.append(frame);
  const { contentDocument: inside, contentWindow: at } = frame;
  inside.open();
  at.complaints = [];
  const complain = text => at.complaints.push(String(text));
  at.addEventListener("error", e => complain(e.message));
  at.addEventListener("unhandledrejection", e => complain(e.reason));
  inside.addEventListener("securitypolicyviolation", e => complain(`${e.violatedDirective} ${e.blockedURI}`));
  at.console.error = at.console.warn = (...said) => complain(said.join(" "));
  at.saved = [];
  at.URL.createObjectURL = blob => { at.saved.push(blob); return "blob:none"; };
  at.URL.revokeObjectURL = () => {};
  at.HTMLAnchorElement.prototype.click = function () {
    if (this.download) at.saved.at(-1).filename = this.download;
    else this.dispatchEvent(new at.MouseEvent("click", { bubbles: true, cancelable: true }));
  };
  inside.write(page);
  inside.close();
  return at;
};
addEventListener("load", async () => {
  const found = document.createElement("pre");
  found.id = "found";
  try {
    const page = %s;
    const wide = open(page, 1280), phone = open(page, 360);
    found.textContent = JSON.stringify(await (async () => { %s })());
  } catch (error) {
    found.textContent = JSON.stringify({ thrown: `${error} ${error.stack}` });
  }
  document.body.replaceChildren(found);
});
</script>"""


def in_chromium(page, script, folder, seconds=60):
    """What an asynchronous JavaScript function returns that has the page's windows ``wide`` and ``phone``.

    A window has its ``complaints`` (errors, warnings, what its policy forbade) and the blobs that it ``saved``.
    """
    path = folder / "frames.html"
    path.write_text(_FRAMES % (json.dumps(page).replace("<", "\\u003c"), script), encoding="utf-8")
    command = [
        CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", f"--virtual-time-budget={1000 * seconds}",
        "--window-size=1400,2000", "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True).stdout
    found = re.search(r'<pre id="found">(.*?)</pre>', dom, flags=re.DOTALL)
    assert found, "the script did not come to its end"
    found = json.loads(html.unescape(found[1]))
    assert "thrown" not in found, found["thrown"]
    return found
