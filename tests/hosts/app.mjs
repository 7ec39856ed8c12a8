// node-llama-cpp as an application uses it: 64 greedy tokens after a prompt of 100, one and five sequences at once, with
// one, two and four threads. Prints the tokens and what the engine logs on the way, and writes the logarithms of the
// probabilities of all tokens at every step: logits but for a constant.
import {writeFileSync} from "node:fs";
import {getLlama, LlamaLogLevel} from "node-llama-cpp";

const [modelPath, values] = process.argv.slice(2);
const llama = await getLlama({
    gpu: false,
    build: "never",
    maxThreads: 0,
    logLevel: LlamaLogLevel.info,
    logger: (level, text) => {
        if (text.includes("deltanet"))
            console.log("log " + text.trim());
    }
});
const model = await llama.loadModel({modelPath, gpuLayers: 0});
const logarithms = [];

async function generate(sequence, at) {
    const last = {generateNext: {token: true, probabilities: true, options: {temperature: 0}}};
    let input = Array.from({length: 100}, (_, place) => (7 + at * 131 + place * 37 + place * place % 101) % 256);
    const tokens = [], steps = [];
    while (tokens.length < 64) {
        const output = await sequence.controlledEvaluate([...input.slice(0, -1), [input.at(-1), last]]);
        const {token, probabilities} = output.at(-1).next;
        tokens.push(token);
        steps.push([...probabilities].sort(([a], [b]) => a - b).map(([, probability]) => Math.log(probability)));
        input = [token];
    }
    return {tokens, steps};
}

for (const count of [1, 5]) {
    for (const threads of [1, 2, 4]) {
        const context = await model.createContext({sequences: count, contextSize: 256, batchSize: 512, threads});
        const runs = await Promise.all(Array.from({length: count}, (_, at) => generate(context.getSequence(), at)));
        for (const [at, {tokens, steps}] of runs.entries()) {
            console.log(`tokens ${count} sequences, ${threads} threads, sequence ${at}: ${tokens.join(" ")}`);
            logarithms.push(...steps.flat());
        }
        await context.dispose();
    }
}
writeFileSync(values, Buffer.from(Float32Array.from(logarithms).buffer));
process.exit(0);
