//! Orders → texts: they join and leave between decode steps.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::Instant;

use super::Shared;
use super::job::{Outcome, Taken, Waiting, Want};
use crate::decode::RequestId;
use crate::engine::{Answer, Event, Order, Writer};
use crate::error::Error;
use crate::timing::Stage;

/// A job whose picture was looked at.
pub(super) type Ordered = (Waiting, Order);

/// Requests that may wait for room in the language model's own line, so that several prompts are read in one run.
const N_IN_LINE: usize = 8;

type Running = HashMap<RequestId, Taken>;

/// Writes until nothing is live and nobody looks any more.
pub(super) fn run(mut writer: Writer, shared: &Shared, orders: &Receiver<Ordered>) {
    let mut running = Running::new();
    loop {
        match catch_unwind(AssertUnwindSafe(|| write(&mut writer, shared, orders, &mut running))) {
            Ok(()) => return,
            // What was being written is lost, and told so; what comes next finds a loop without it.
            Err(_) => {
                running.clear();
                writer = writer.renewed();
            }
        }
    }
}

fn write(writer: &mut Writer, shared: &Shared, orders: &Receiver<Ordered>, running: &mut Running) {
    loop {
        let next = if writer.is_idle() {
            orders.recv().map_err(|_| TryRecvError::Disconnected)
        } else if writer.n_waiting() < N_IN_LINE {
            orders.try_recv()
        } else {
            Err(TryRecvError::Empty) // what is not yet here keeps its place in line
        };
        match next {
            Ok(ordered) => {
                join(writer, ordered, running);
                continue; // all that wait join before the next step
            }
            Err(TryRecvError::Disconnected) if writer.is_idle() => return,
            Err(_) => {}
        }
        forget_the_gone(writer, running);
        let start = Instant::now();
        let events = writer.step();
        shared.watch.stepped(writer.n_live(), start.elapsed());
        for event in events {
            take(writer, event, running);
        }
    }
}

fn join(writer: &mut Writer, (waiting, mut order): Ordered, running: &mut Running) {
    let Some(waiting) = waiting.if_wanted() else { return };
    waiting.begin_order(&mut order, Stage::Waiting);
    match writer.join(order) {
        Ok(id) => drop(running.insert(id, waiting.job)),
        Err(error) => waiting.job.end(Err(error)),
    }
}

/// Beam search settles nothing before its end, so callers that went away are looked for before every step.
fn forget_the_gone(writer: &mut Writer, running: &mut Running) {
    let gone: Vec<_> = running.iter().filter(|(_, job)| job.terms.gone.is_gone()).map(|(id, _)| *id).collect();
    for id in gone {
        writer.leave(id);
        if let Some(job) = running.remove(&id) {
            job.end(Err(Error::Gone));
        }
    }
}

fn take(writer: &mut Writer, event: Event, running: &mut Running) {
    let Some(job) = running.get_mut(&event.id) else { return };
    let settled = !event.tokens.is_empty() || !event.text.is_empty();
    let flow = if settled { job.settled(&event.tokens, &event.text) } else { ControlFlow::Continue(()) };
    let end = match flow {
        ControlFlow::Continue(()) => event.end,
        ControlFlow::Break(()) => event.end.or_else(|| writer.leave(event.id).map(Ok)),
    };
    if let Some(end) = end {
        let job = running.remove(&event.id).expect("it was there");
        let end = end.map(|answer| outcome(&job.want, answer));
        job.end(end);
    }
}

fn outcome(want: &Want, answer: Answer) -> Outcome {
    match want {
        Want::Rank(_, answers) => {
            let answers: Vec<&str> = answers.iter().map(String::as_str).collect();
            Outcome::Ranked(answer.ranked(&answers).collect(), answer.timings)
        }
        _ => Outcome::Written(Box::new(answer)),
    }
}
