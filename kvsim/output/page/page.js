// The form answers as it is changed: the same page is asked for, its answer takes the old one's place, and the
// address follows, so that it can be shared.  Without this script the button and the tabs' links do the same.
const asks = document.getElementById("ask");
const result = document.getElementById("result");
const busy = document.getElementById("busy");
let asking = null;

function fold() {
  // A phone's first screen is for the answer.
  if (matchMedia("(max-width: 47.99rem)").matches) asks.querySelector(".question").removeAttribute("open");
}

function idle() {
  asking = null;
  busy.hidden = true;
  result.removeAttribute("aria-busy");
}

async function ask(address, remember, whole) {
  if (asking) asking.abort(); // nobody waits for the answer before: the server gives it up
  const mine = (asking = new AbortController());
  result.setAttribute("aria-busy", "true");
  busy.hidden = false;
  try {
    const page = await fetch(address, { headers: { Accept: "text/html" }, signal: mine.signal });
    const fresh = new DOMParser().parseFromString(await page.text(), "text/html");
    if (mine !== asking) return;
    result.innerHTML = fresh.getElementById("result").innerHTML;
    document.title = fresh.title;
    document.querySelector("h1").textContent = fresh.querySelector("h1").textContent;
    fresh.querySelectorAll("nav.tabs a").forEach((link, place) => {
      const own = document.querySelectorAll("nav.tabs a")[place];
      own.href = link.getAttribute("href");
      if (link.hasAttribute("aria-current")) own.setAttribute("aria-current", "page");
      else own.removeAttribute("aria-current");
    });
    if (whole) {
      asks.innerHTML = fresh.getElementById("ask").innerHTML;
      fold();
    }
    if (remember) history.pushState(null, "", address);
    idle();
  } catch (error) {
    if (mine !== asking) return;
    idle();
    if (error.name !== "AbortError") location.assign(address);
  }
}

function address(tab) {
  const fields = new FormData(asks.querySelector("form"));
  if (tab) fields.set("tab", tab);
  return "?" + new URLSearchParams(fields).toString();
}

busy.querySelector("button").addEventListener("click", () => {
  if (asking) asking.abort();
  idle();
});
asks.addEventListener("change", () => ask(address(), true, false));
asks.addEventListener("submit", (event) => {
  event.preventDefault();
  ask(address(), true, false);
});
document.querySelector("nav.tabs").addEventListener("click", (event) => {
  const tab = event.target.closest("a")?.dataset.tab;
  if (!tab || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  ask(address(tab), true, true);
});
window.addEventListener("popstate", () => location.reload());
fold();
