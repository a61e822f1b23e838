// Opens pages in a headless browser and prints what it finds as JSON, for test_in_browser.py.
//
//     node look.mjs PLAN
//
// PLAN is a JSON file, {"address", "file"?, "typed"?, "picture"?, "once"?}. The page is opened at three widths, light and
// dark, or `once`. `file` is put into the page's file input, `typed` into its address field. CHROME can name another browser.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import chromium from "@sparticuz/chromium";
import puppeteer from "puppeteer-core";

const AXE = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const WIDTHS = [360, 800, 1440];
const SCHEMES = ["light", "dark"];
// Options of this build that would make the browser more permissive than a person's.
const PERMISSIVE = /disable-web-security|allow-running-insecure|site-isolation|disable-features|site-per-process/;

const isReady = () => !document.getElementById("status").textContent.startsWith("Reading");

/** Do what a step asks for on a page that was opened. */
async function use(page, { file, typed }) {
  if (file) await (await page.$("#file")).uploadFile(file);
  if (typed) {
    await page.type("#address", typed);
    await page.keyboard.press("Enter");
  }
  if (file || typed) await page.waitForFunction(isReady, { timeout: 20_000 });
}

/** Return what is to be checked: errors, violations of accessibility, overflow, and what the page shows. */
async function look(browser, step, width, scheme) {
  const page = await browser.newPage();
  const errors = [];
  page.on("pageerror", (error) => errors.push(String(error)));
  page.on("console", (message) => message.type() === "error" && errors.push(message.text()));
  page.on("dialog", (dialog) => {
    errors.push(`dialog ${dialog.message()}`);
    dialog.dismiss();
  });
  await page.setViewport({ width, height: 900 });
  await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: scheme }]);
  await page.goto(step.address);
  await use(page, step);
  const found = await page.evaluate(() => ({
    overflow: document.documentElement.scrollWidth - innerWidth,
    text: document.body.innerText,
    background: getComputedStyle(document.body).backgroundColor,
    cells: document.querySelectorAll(".heat tbody td").length,
  }));
  if (step.picture) await page.screenshot({ path: `${step.picture}-${width}-${scheme}.png` });
  await page.close();
  return { width, scheme, errors, violations: await violations(browser, step, width, scheme), ...found };
}

/** Return the violations that axe finds, on a page of its own, because axe needs scripts that the page forbids. */
async function violations(browser, step, width, scheme) {
  const page = await browser.newPage();
  await page.setBypassCSP(true);
  await page.setViewport({ width, height: 900 });
  await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: scheme }]);
  await page.goto(step.address);
  await use(page, step);
  await page.evaluate(() => document.querySelectorAll("details").forEach((one) => (one.open = true)));
  await page.evaluate(AXE);
  const found = await page.evaluate(() => axe.run({ preload: false }));
  await page.close();
  return found.violations.map(({ id, nodes }) => `${id}: ${nodes[0].html.slice(0, 200)}`);
}

const plan = JSON.parse(readFileSync(process.argv[2]));
const browser = await puppeteer.launch({
  args: chromium.args.filter((option) => !PERMISSIVE.test(option)),
  executablePath: process.env.CHROME ?? (await chromium.executablePath()),
  headless: "shell",
});
try {
  const looks = [];
  for (const width of plan.once ? WIDTHS.slice(-1) : WIDTHS) {
    for (const scheme of plan.once ? SCHEMES.slice(0, 1) : SCHEMES) looks.push(await look(browser, plan, width, scheme));
  }
  console.log(JSON.stringify(looks));
} finally {
  await browser.close();
}
