//! Orders → texts: they join and leave between decode steps.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::sync::mpsc::{Receiver, TryRecvError};

use super::job::{Outcome, Taken, Waiting};
use crate::decode::RequestId;
use crate::engine::{Event, Order, Writer};
use crate::timing::Stage;

/// A job whose picture was looked at.
pub(super) type Ordered = (Waiting, Order);

/// Writes until nothing is live and nobody looks any more.
pub(super) fn run(mut writer: Writer, orders: &Receiver<Ordered>) {
    let mut running = HashMap::new();
    loop {
        let next = if writer.is_idle() { orders.recv().map_err(|_| TryRecvError::Disconnected) } else { orders.try_recv() };
        match next {
            Ok(ordered) => {
                join(&mut writer, ordered, &mut running);
                continue; // all that wait join before the next step
            }
            Err(TryRecvError::Disconnected) if writer.is_idle() => return,
            Err(_) => {}
        }
        for event in writer.step() {
            take(&mut writer, event, &mut running);
        }
    }
}

fn join(writer: &mut Writer, (waiting, mut order): Ordered, running: &mut HashMap<RequestId, Taken>) {
    order.timings.add(Stage::Waiting, waiting.waited());
    match writer.join(order) {
        Ok(id) => drop(running.insert(id, waiting.job)),
        Err(error) => waiting.job.end(Err(error)),
    }
}

fn take(writer: &mut Writer, event: Event, running: &mut HashMap<RequestId, Taken>) {
    let Some(job) = running.get_mut(&event.id) else { return };
    let settled = !event.tokens.is_empty() || !event.text.is_empty();
    let flow = if settled { job.settled(&event.tokens, &event.text) } else { ControlFlow::Continue(()) };
    let end = match flow {
        ControlFlow::Continue(()) => event.end,
        ControlFlow::Break(()) => event.end.or_else(|| writer.leave(event.id).map(Ok)),
    };
    if let Some(end) = end {
        let job = running.remove(&event.id).expect("it was there");
        job.end(end.map(|answer| Outcome::Written(Box::new(answer))));
    }
}
