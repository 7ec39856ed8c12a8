// node-llama-cpp as an application uses it: 64 greedy tokens after a prompt, and what the engine logs on the way.
import {getLlama, LlamaLogLevel} from "node-llama-cpp";

const llama = await getLlama({
    gpu: false,
    build: "never",
    logLevel: LlamaLogLevel.info,
    logger: (level, text) => {
        if (text.includes("deltanet"))
            console.log("log " + text.trim());
    }
});
const model = await llama.loadModel({modelPath: process.argv[2], gpuLayers: 0});
const context = await model.createContext({contextSize: 512, threads: 2});
const sequence = context.getSequence();
const prompt = Array.from({length: 100}, (_, at) => (7 + at * 37 + at * at % 101) % 256);
const tokens = [];
for await (const token of sequence.evaluate(prompt, {temperature: 0})) {
    tokens.push(token);
    if (tokens.length === 64)
        break;
}
console.log("tokens " + tokens.join(" "));
process.exit(0);
