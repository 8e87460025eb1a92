//! Two reports beside each other, and conditions under which a change is too bad.

use std::fmt::Write as _;
use std::str::FromStr;

use super::BenchError;
use super::report::Report;
use super::statistics::Percentile;
use super::truths::Truth;

/// What changed from one report to another.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    /// As conditions name it.
    pub name: String,
    /// In the first.
    pub before: f64,
    /// In the second.
    pub after: f64,
    /// After divided by before, at least and at most as far as both intervals tell; none of rates, which have none.
    pub interval: Option<[f64; 2]>,
}

/// A change that is too bad: `p99>+5%`, `time_to_first_token.p50>+10%`, `images<-3%`.
#[derive(Clone, Debug, PartialEq)]
pub struct Condition {
    typed: String,
    name: String,
    grows: bool,
    share: f64,
}

impl Change {
    /// After divided by before.
    pub fn ratio(&self) -> f64 {
        self.after / self.before
    }

    /// Whether the intervals leave no doubt that there is a change.
    pub fn is_sure(&self) -> bool {
        self.interval.is_some_and(|[low, high]| low > 1.0 || high < 1.0)
    }
}

impl FromStr for Condition {
    type Err = String;

    fn from_str(typed: &str) -> Result<Self, String> {
        let bad = || format!("`{typed}` is no condition; one is `p99>+5%`, `time_to_first_token.p50>+10%` or `images<-3%`");
        let at = typed.find(['<', '>']).ok_or_else(bad)?;
        let (name, change) = (typed[..at].trim(), typed[at + 1..].trim());
        let percent: f64 = change.strip_suffix('%').and_then(|number| number.trim().parse().ok()).ok_or_else(bad)?;
        let grows = typed[at..].starts_with('>');
        if name.is_empty() || !percent.is_finite() || grows != (percent >= 0.0) {
            return Err(bad());
        }
        let name = if is_percentile(name) { format!("end_to_end.{name}") } else { name.to_owned() };
        Ok(Self { typed: typed.to_owned(), name, grows, share: percent / 100.0 })
    }
}

impl Condition {
    /// Whether it is met, with what to say then; an error if the reports have nothing of that name.
    pub fn meets(&self, changes: &[Change]) -> Result<Option<String>, BenchError> {
        let known = || changes.iter().map(|change| change.name.as_str()).collect::<Vec<_>>().join(", ");
        let change = changes.iter().find(|change| change.name == self.name);
        let change = change.ok_or_else(|| BenchError::UnknownFigure { name: self.name.clone(), known: known() })?;
        let by = change.ratio() - 1.0;
        let met = if self.grows { by > self.share } else { by < self.share };
        Ok(met.then(|| format!("{}: {} changed by {:+.1} %", self.typed, self.name, by * 100.0)))
    }
}

/// Percentiles of latencies and stages, rates, and shares of true answers that both reports have.
pub fn changes(before: &Report, after: &Report) -> Vec<Change> {
    let mut found = Vec::new();
    for (name, summary) in &before.figures.latencies_ms {
        let Some(other) = after.figures.latencies_ms.get(name) else { continue };
        let pairs = summary.percentiles.iter().zip(&other.percentiles);
        found.extend(pairs.filter(|(a, b)| a.rank == b.rank).map(|(a, b)| of_percentiles(name, a, b)));
    }
    for (name, summary) in &before.figures.stages_ms {
        let Some((_, other)) = after.figures.stages_ms.iter().find(|(stage, _)| stage == name) else { continue };
        // A stage that took no time has no ratio.
        let pairs = summary.percentiles.iter().zip(&other.percentiles).filter(|(a, b)| a.rank == b.rank && a.value > 0.0);
        found.extend(pairs.map(|(a, b)| of_percentiles(&format!("stage_{name}"), a, b)));
    }
    let rates = |report: &Report| {
        let (rates, truth) = (report.figures.rates, report.figures.truth.map(Truth::share));
        [
            ("images", Some(rates.images)),
            ("tokens", Some(rates.tokens)),
            ("queries", Some(rates.queries)),
            ("good", rates.good),
            ("true", truth),
        ]
    };
    for ((name, before), (_, after)) in rates(before).into_iter().zip(rates(after)) {
        if let (Some(before), Some(after)) = (before.filter(|rate| *rate > 0.0), after) {
            found.push(Change { name: name.to_owned(), before, after, interval: None });
        }
    }
    found
}

/// Why figures of two reports say nothing about each other; nothing if they do.
pub fn objections(before: &Report, after: &Report) -> Vec<String> {
    let (a, b) = (&before.machine, &after.machine);
    let machine = |report: &Report| {
        let machine = &report.machine;
        format!("{} ({})", machine.processor.as_deref().unwrap_or("an unknown processor"), machine.instruction_set)
    };
    let same_machine = a.processor == b.processor && a.instruction_set == b.instruction_set && a.gpus == b.gpus;
    let (x, y) = (&before.work, &after.work);
    let same_work = (&x.scenario, &x.task, x.pictures, &x.arrivals) == (&y.scenario, &y.task, y.pictures, &y.arrivals);
    [
        (!same_machine).then(|| format!("the first is of {}, the second of {}", machine(before), machine(after))),
        (a.usable_processors != b.usable_processors)
            .then(|| format!("the first had {} processors, the second {}", a.usable_processors, b.usable_processors)),
        (!same_work).then(|| {
            format!(
                "the first is {} of {}, {}; the second {} of {}, {}",
                x.scenario, x.task, x.arrivals, y.scenario, y.task, y.arrivals
            )
        }),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// A table for people, in Markdown.
pub fn markdown(changes: &[Change]) -> String {
    let mut out = String::from("| | before | after | after / before | interval | |\n|---|---|---|---|---|---|\n");
    for change in changes {
        let interval = change.interval.map(|[low, high]| format!("{low:.3}–{high:.3}")).unwrap_or_default();
        let sure = if change.is_sure() { "sure" } else { "" };
        let Change { name, before, after, .. } = change;
        writeln!(out, "| {name} | {before:.3} | {after:.3} | {:.3} | {interval} | {sure} |", change.ratio()).expect("a string");
    }
    out
}

fn of_percentiles(name: &str, before: &Percentile, after: &Percentile) -> Change {
    let ([a_low, a_high], [b_low, b_high]) = (before.interval, after.interval);
    Change {
        name: format!("{name}.p{}", before.rank),
        before: before.value,
        after: after.value,
        interval: Some([b_low / a_high, b_high / a_low]),
    }
}

fn is_percentile(name: &str) -> bool {
    name.strip_prefix('p').is_some_and(|rank| rank.parse::<f64>().is_ok())
}

#[cfg(test)]
mod tests {
    use super::super::report::tests::report;
    use super::*;

    fn condition(typed: &str) -> Condition {
        typed.parse().expect("a condition")
    }

    #[test]
    fn a_condition_is_met_by_what_it_names() {
        let before = report(100);
        let mut after = before.clone();
        let p99 = &mut after.figures.latencies_ms.get_mut("end_to_end").expect("it is there").percentiles[3];
        p99.value *= 1.06;
        after.figures.rates.images *= 0.9;
        let changes = changes(&before, &after);
        for (typed, met) in [
            ("p99>+5%", true),
            ("p99>+7%", false),
            ("p50 > +0%", false),
            ("end_to_end.p99>5%", true),
            ("images<-5%", true),
            ("images<-15%", false),
        ] {
            assert_eq!(condition(typed).meets(&changes).expect("it is there").is_some(), met, "{typed}");
        }
        let vision = &mut after.figures.stages_ms[0].1.percentiles[0];
        vision.value *= 1.2;
        let changes = super::changes(&before, &after);
        assert!(condition("stage_vision.p50>+10%").meets(&changes).expect("both have it").is_some());
        let unknown = condition("time_to_first_token.p50>+1%").meets(&changes).expect_err("embeddings have none");
        assert!(unknown.to_string().contains("end_to_end.p50"), "{unknown}");
    }

    #[test]
    fn what_is_no_condition_is_told_what_one_is() {
        for typed in ["", "p99", "p99>5", "p99>-5%", "images<+5%", ">5%", "p99>x%", "p99>+inf%"] {
            let error = typed.parse::<Condition>().expect_err(typed);
            assert!(error.contains("`p99>+5%`"), "{error}");
        }
    }

    #[test]
    fn a_change_is_sure_where_intervals_do_not_meet() {
        let (before, mut after) = (report(400), report(400));
        assert!(changes(&before, &after).iter().all(|change| !change.is_sure()));
        for percentile in &mut after.figures.latencies_ms.get_mut("end_to_end").expect("it is there").percentiles {
            percentile.value *= 3.0;
            percentile.interval = percentile.interval.map(|edge| edge * 3.0);
        }
        assert!(changes(&before, &after).iter().find(|change| change.name == "end_to_end.p50").expect("it is there").is_sure());
    }

    #[test]
    fn other_machines_and_other_work_are_objected_to() {
        let (before, mut after) = (report(10), report(10));
        assert!(objections(&before, &after).is_empty());
        after.machine.instruction_set = "amx".into();
        after.work.task = "ask".into();
        let said = objections(&before, &after);
        assert!(said.len() == 2 && said[0].contains("(amx)") && said[1].contains("ask"), "{said:?}");
    }
}
